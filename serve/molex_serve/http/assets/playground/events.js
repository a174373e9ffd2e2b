// Server-sent events, as the server writes them: "data: JSON" and an empty line each, the last one "data: [DONE]".

const FIELD = "data: ";

export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection broke off before the answer was complete");
    const events = (unread + value).split("\n\n");
    unread = events.pop();
    for (const event of events) {
      const data = event.slice(FIELD.length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
