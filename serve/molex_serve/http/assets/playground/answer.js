// One answer on the page, while it grows: its tokens, each in its expert's colours, the legend, how fast it came.

import { copyOf } from "./elements.js";
import { dress } from "./experts.js";
import { Legend } from "./legend.js";
import { Speed } from "./speed.js";

const ENDS = { stop: "finished", length: "cut at max tokens" };

export class Answer {
  constructor(model, question) {
    this.element = copyOf("answer");
    this.element.querySelector("h2").textContent = model;
    this.element.querySelector(".question").textContent = question;
    this.tokens = this.element.querySelector(".text");
    this.legend = new Legend(this.element.querySelector(".legend"));
    this.speed = new Speed();
    this.how = "broken off";
    this.reachable = false; // whether the tab key stops at one of the tokens
    this.element.classList.add("growing");
  }

  get text() {
    return this.tokens.textContent;
  }

  get begun() {
    return this.speed.first !== null;
  }

  // A chunk of the stream. The last one has no choice and says how many tokens there were: a piece of a character that
  // was cut off at the end is written, and is no token.
  take({ choices: [choice], usage }) {
    if (usage) this.speed.count = usage.completion_tokens;
    const tokens = choice?.experts ?? [];
    this.tokens.append(...tokens.filter(({ text }) => text !== "").map((token) => this.dressed(token)));
    this.speed.arrived(tokens.length);
    this.legend.add(tokens);
    this.legend.show(this.speed.count);
    this.how = ENDS[choice?.finish_reason] ?? this.how;
  }

  dressed({ text, name, share }) {
    const token = Object.assign(document.createElement("span"), { className: "token", textContent: text });
    if (text.startsWith("\n")) token.classList.add("newline");
    if (name === null) return token;
    dress(token, name);
    token.dataset.expert = name;
    token.dataset.share = share;
    token.style.setProperty("--share", share);
    token.tabIndex = this.reachable ? -1 : 0;
    this.reachable = true;
    return token;
  }

  end(how = this.how) {
    this.element.classList.remove("growing");
    this.element.querySelector(".figures").textContent = `${this.speed.describe()} · ${how}`;
  }
}
