// Asking and being answered, one question at a time. A chat goes on from what was said; a completion starts anew.

import { Answer } from "./answer.js";
import { byId, tell } from "./elements.js";
import { questionOf } from "./question.js";
import { stream } from "./server.js";

export class Talk {
  // models: knows the base's name. changed: called when an answer begins and ends, since adapters come to the device.
  constructor(form, models, changed) {
    this.form = form;
    this.models = models;
    this.changed = changed;
    this.answers = byId("answers");
    this.messages = [];
    this.running = null;
  }

  bind() {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running === null) this.run();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("clear").addEventListener("click", () => this.clear());
    for (const mode of this.form.elements.mode) mode.addEventListener("change", () => this.clear());
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    this.answers.replaceChildren();
    tell(byId("problem"), null);
  }

  async run() {
    const messages = this.messages; // of this chat, also where it is cleared meanwhile
    const question = questionOf(this.form, this.models.base, messages);
    const answer = this.begin(question);
    const { signal } = this.running;
    try {
      for await (const chunk of stream(question.path, question.body, signal)) this.grow(answer, chunk);
      answer.end();
    } catch (error) {
      this.fail(answer, question, signal.aborted ? null : error);
    }
    if (question.chat && answer.begun) {
      messages.push({ role: "user", content: question.text }, { role: "assistant", content: answer.text });
    }
    this.rest();
  }

  begin({ model, chat, text }) {
    this.running = new AbortController();
    const answer = new Answer(model, chat ? text : "");
    if (!chat) this.answers.replaceChildren();
    this.answers.append(answer.element);
    answer.element.scrollIntoView({ block: "nearest" });
    if (chat) byId("prompt").value = "";
    tell(byId("problem"), null);
    this.say("Waiting for the first token…", true);
    this.changed();
    return answer;
  }

  grow(answer, chunk) {
    const waited = !answer.begun;
    answer.take(chunk);
    if (waited && answer.begun) {
      this.say("Answering…", true);
      this.changed();
    }
  }

  // What was said stays on the page; a question that got no answer goes back to where it was typed.
  fail(answer, { chat, text }, error) {
    answer.end(error === null ? "stopped" : "broken off");
    if (error !== null) tell(byId("problem"), error);
    if (answer.begun) return;
    answer.element.remove();
    if (chat && byId("prompt").value === "") byId("prompt").value = text;
  }

  rest() {
    this.running = null;
    this.say("", false);
    this.changed();
  }

  say(status, busy) {
    byId("status").textContent = status;
    byId("run").disabled = busy;
    byId("stop").disabled = !busy;
    this.answers.setAttribute("aria-busy", busy);
  }
}
