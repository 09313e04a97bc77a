"""A stored matrix as packed weight: GGUF's blocks as they are, all else rounded on the way."""

import torch
from torch import Tensor

from tramontane.checkpoint.files.gguf_values import PackedTensor
from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.name_table import Part
from tramontane.errors import CheckpointError, ConfigError
from tramontane.quant.formats import Fitted, PackedWeight, Packer, QuantFormat, pack_rows

# GGML's types that are one of our formats in another order: blocks of 32 values and an fp16 scale.
FORMAT_OF_ENCODING = {"Q4_0": QuantFormat(4), "Q8_0": QuantFormat(8)}
_SCALE_BYTES = 2


def read_packed(
    part: Part, stored: StoredTensor, format: QuantFormat, *, packer: Packer
) -> PackedWeight:
    """The matrix that `part` takes from `stored`, some rows at a time.

    The values of a Q4_0 or Q8_0 tensor in the format of these are exactly the file's. Raises
    CheckpointError, naming the tensor, on values that are not finite or beyond the scales.
    """
    try:
        if (
            not isinstance(stored, PackedTensor)
            or FORMAT_OF_ENCODING.get(stored.encoding) != format
        ):
            return packer.pack(part.change.to_ours(stored.read()), format)
        blocks = part.change.to_ours(stored.read_blocks())  # (N, bytes of a row)
        rows, columns = stored.shape
        return pack_rows((rows, columns), format, lambda some: split_blocks(blocks[some], format))
    except ConfigError as error:
        raise CheckpointError(f"{stored.place}: {error}; a damaged file?") from None


def split_blocks(rows: Tensor, format: QuantFormat) -> Fitted:
    """Rows of blocks (N, bytes) as whole numbers and scales.

    Q8_0 is a scale and 32 signed bytes, which 128 makes unsigned. Q4_0 is a scale and 16 bytes: the
    low halves are the values 0 .. 15 of the block, the high halves 16 .. 31.
    """
    num_bytes = _SCALE_BYTES + format.group_size * format.bits // 8
    blocks = rows.unflatten(-1, (-1, num_bytes))  # (N, K/32, bytes of a block)
    scales = blocks[..., :_SCALE_BYTES].contiguous().view(torch.float16)[..., 0]
    data = blocks[..., _SCALE_BYTES:]
    q = data ^ 128 if format.bits == 8 else torch.cat((data & 15, data >> 4), dim=-1)
    return Fitted(q.flatten(-2), scales, None)
