// One answer: the request, its events as { text, pieces }, and what it took.

import { streamEvents } from "./api.js";
import { joinStory } from "./conversations.js";

// Yields { text, pieces, finishReason, usage } as they come.
export async function* generate({ conversation, model, params, key, signal }) {
  const [path, body] = buildRequest(conversation, model, params);
  for await (const { choices, usage } of streamEvents(path, body, { key, signal })) {
    const choice = choices?.[0];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? "",
      pieces: choice?.routing ?? [],
      finishReason: choice?.finish_reason,
      usage,
    };
  }
}

function buildRequest({ mode, messages }, model, params) {
  const body = {
    model: model.id,
    stream: true,
    stream_options: { include_usage: true },
    ...params,
  };
  if (model.numExperts) body.return_routing = "answer";
  if (mode === "story") return ["v1/completions", { ...body, prompt: joinStory(messages) }];
  const turns = messages.map(({ role, text }) => ({ role, content: text }));
  return ["v1/chat/completions", { ...body, messages: turns }];
}

// Counts and times of an answer as this page sees it come; the server's own counts at the end.
export class Meter {
  constructor(expertsPerToken) {
    this.start = performance.now();
    this.expertsPerToken = expertsPerToken;
    this.numTokens = 0;
  }

  note({ text, pieces, finishReason, usage }) {
    const numTokens = pieces.length || (text ? 1 : 0);
    if (numTokens) {
      this.last = performance.now();
      if (!this.numTokens) [this.first, this.firstCount] = [this.last, numTokens];
      this.numTokens += numTokens;
    }
    this.finishReason = finishReason ?? this.finishReason;
    this.usage = usage ?? this.usage;
  }

  get stats() {
    const { usage, first, last } = this;
    const tokens = usage?.completion_tokens ?? this.numTokens;
    const seconds = (last - first) / 1000;
    return {
      tokens,
      tokensPerSecond: seconds > 0 ? (this.numTokens - this.firstCount) / seconds : null,
      secondsToFirst: first ? (first - this.start) / 1000 : null,
      expertsPerToken: this.expertsPerToken,
      cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
      context: usage ? usage.prompt_tokens + usage.completion_tokens : null,
      finishReason: this.finishReason ?? null,
    };
  }
}

const ENDS = { stop: "ended", length: "cut", abort: "stopped" };

// [[value, what it is], ...]
export function describeStats(stats, contextLength) {
  const { tokens, tokensPerSecond, secondsToFirst, expertsPerToken, cached, context } = stats;
  const number = (value, digits = 0) =>
    value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const facts = [];
  if (tokensPerSecond != null)
    facts.push([number(tokensPerSecond, tokensPerSecond < 100 ? 1 : 0), "tokens/s"]);
  if (secondsToFirst != null) facts.push([`${number(secondsToFirst, 2)} s`, "to start"]);
  const end = ENDS[stats.finishReason];
  facts.push([number(tokens), end ? `tokens, ${end}` : "tokens"]);
  if (expertsPerToken)
    facts.push([number(expertsPerToken), expertsPerToken === 1 ? "expert" : "experts"]);
  if (cached != null) facts.push([number(cached), "cached"]);
  if (context != null && contextLength) {
    facts.push([`${number(context)}/${number(contextLength)}`, "context"]);
  }
  return facts;
}
