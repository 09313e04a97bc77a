"""What all requests have in common: strict known fields; unknown ones are let in, and named.

All lists fail fast: a million wrong items are one error, not a million.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tramontane.server.errors import unsupported

MAX_ENCODED = 1_048_576  # characters, or ids, of what need not fit the context
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1024)]
Ignored = Annotated[Any, Field(description="accepted, without effect")]


class ApiModel(BaseModel):
    """Types are strict: "1" is no number. A field that is null counts as absent."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    def list_unknown(self) -> list[str]:
        """Names of the fields that no interface served here knows, those within others too."""
        names = list(self.model_extra or ())
        for name, value in self:
            parts = value if isinstance(value, list) else [value]
            inner = [part.list_unknown() for part in parts if isinstance(part, ApiModel)]
            names += dict.fromkeys(f"{name}.{inside}" for one in inner for inside in one)
        return names

    def require_supported(self, remedies: dict[str, str]) -> None:
        """Raises ApiError 400 for a field that asks for what is not served.

        `remedies` says of each such field what to do instead; null, false, 0 and what is empty ask
        for nothing.
        """
        values = {**(self.model_extra or {}), **dict(self)}
        for name, remedy in remedies.items():
            if values.get(name):
                raise unsupported(name, remedy)


class ApiRequest(ApiModel):
    """The body of a POST."""

    model: Annotated[str, Field(max_length=512)] | None = None


class StreamOptions(ApiModel):
    """How a stream ends."""

    include_usage: bool | None = None


class JsonSchemaFormat(ApiModel):
    """OpenAI's wrapper of a JSON schema."""

    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """Free text, a JSON object, or a JSON document of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> Self:
        if self.type == "json_schema" and (
            self.json_schema is None or self.json_schema.json_schema is None
        ):
            raise ValueError("the type json_schema needs json_schema.schema, a JSON schema")
        return self


class StructuredOutputs(ApiModel):
    """vLLM's field: one of these is set."""

    json_document: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Ignored = None
