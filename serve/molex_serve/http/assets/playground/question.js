// What is asked of the server, read from the form: where to send it, and the body. Empty fields are null, which is as
// good as absent.

export function questionOf(form, base, messages) {
  const given = new FormData(form);
  const number = (name) => (given.get(name) === "" ? null : Number(given.get(name)));
  const model = given.get("model");
  const chat = given.get("mode") === "chat";
  const text = given.get("prompt");
  const body = {
    ...(model === base ? { model } : { adapter: model }),
    ...(chat ? { messages: [...messages, { role: "user", content: text }] } : { prompt: text }),
    temperature: number("temperature"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    task: number("task"),
    stream: true,
    stream_options: { include_usage: true },
    return_experts: true,
  };
  return { model, chat, text, body, path: chat ? "v1/chat/completions" : "v1/completions" };
}
