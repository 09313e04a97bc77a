// Speaks to the server that the page came from. The key travels in the Authorization header alone.

export class ApiError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Addresses are relative, so that the page also works behind a path of a proxy.
function request(path, { key, body, signal }) {
  const headers = { Accept: body ? "text/event-stream" : "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  return fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal,
    cache: "no-store",
    referrerPolicy: "no-referrer",
  });
}

async function open(path, options) {
  if (!/^[!-~]*$/.test(options.key)) {
    throw new ApiError("An API key has letters, digits and signs of ASCII alone.", { status: 401 });
  }
  let response;
  try {
    response = await request(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await readError(response);
  return response;
}

async function readError(response) {
  const text = await response.text();
  const facts = { status: response.status };
  const said = `HTTP ${response.status}: ${text.slice(0, 300) || "no text"}`;
  try {
    const { message, code } = JSON.parse(text).error;
    return new ApiError(message ? String(message) : said, { ...facts, code });
  } catch {
    return new ApiError(said, facts); // not our server's words, a proxy's perhaps
  }
}

// [{ id, contextLength, hasChat, nLayers, numExperts, expertsPerToken, defaults }]
export async function fetchModels(key, signal) {
  const response = await open("v1/models", { key, signal });
  const { data } = await response.json();
  return data.map(describeModel);
}

function describeModel({ id, max_model_len, capabilities, tramontane = {} }) {
  return {
    id: String(id),
    contextLength: max_model_len ?? null,
    hasChat: tramontane.chat_format ?? capabilities?.completion_chat ?? false,
    nLayers: tramontane.n_layers ?? 0,
    numExperts: tramontane.num_experts ?? 0,
    expertsPerToken: tramontane.num_experts_per_tok ?? 0,
    defaults: tramontane.default_params ?? {},
  };
}

// The events of an answer, parsed. Throws ApiError for an error in the stream or one cut short.
export async function* streamEvents(path, body, { key, signal }) {
  const response = await open(path, { key, body, signal });
  try {
    for await (const data of readServerSentEvents(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(String(event.error.message), { code: event.error.code });
      yield event;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke; what came before is kept.");
  }
  throw new ApiError("The answer ended before its end; what came is kept.");
}

// The data of each event: fields of one event are lines, an empty line ends it. Comments (pings)
// and other fields are skipped, as the standard says.
async function* readServerSentEvents(stream) {
  let data = [];
  for await (const line of readLines(stream)) {
    if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
    else if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    }
  }
}

async function* readLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) yield line.endsWith("\r") ? line.slice(0, -1) : line;
    }
  } finally {
    await reader.cancel().catch(() => {}); // the stream broke or was aborted: nothing left to end
  }
}
