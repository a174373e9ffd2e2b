// How many tokens of an answer each expert served, the busiest first.

import { copyOf } from "./elements.js";
import { dress } from "./experts.js";

export class Legend {
  constructor(list) {
    this.list = list;
    this.served = new Map(); // expert -> tokens
  }

  add(tokens) {
    for (const { name } of tokens) {
      if (name !== null) this.served.set(name, (this.served.get(name) ?? 0) + 1);
    }
  }

  // total: tokens of the answer, of which the rest were served by no expert.
  show(total) {
    const sorted = [...this.served].sort((a, b) => b[1] - a[1]);
    const plain = total - sorted.reduce((sum, [, count]) => sum + count, 0);
    const entries = sorted.map(([name, count]) => entry(name, count, (item) => dress(item, name)));
    if (plain > 0) entries.push(entry("no expert", plain));
    this.list.replaceChildren(...entries);
  }
}

function entry(name, count, decorate = () => {}) {
  const item = copyOf("legend-entry");
  decorate(item.querySelector(".swatch"));
  item.querySelector(".name").textContent = name;
  item.querySelector(".count").textContent = count;
  return item;
}
