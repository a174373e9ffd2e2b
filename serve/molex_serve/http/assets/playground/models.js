// The base and its adapters: which one is picked, where each one is, and a way to unload it.

import { byId, copyOf } from "./elements.js";
import { bytes } from "./sizes.js";

const PLACES = ["device", "host", "disk"];

export class ModelList {
  // unload: called with what is known of an adapter, as the server lists it.
  constructor(list, unload) {
    this.list = list;
    this.unload = unload;
    this.base = null;
    this.rows = new Map(); // name -> { item, card }
  }

  // Rows stay the same elements and in their places, so that what is picked or has the focus stays so.
  show(cards) {
    const names = new Set(cards.map((card) => card.id));
    for (const [name, row] of this.rows) {
      if (!names.has(name)) this.drop(name, row);
    }
    let next = this.list.firstElementChild;
    for (const card of cards) {
      const row = this.rows.get(card.id) ?? this.add(card.id);
      row.card = card;
      fill(row.item, card);
      if (row.item === next) next = next.nextElementSibling;
      else this.list.insertBefore(row.item, next);
    }
    this.pickFirst(cards);
    byId("summary").textContent = summary(cards.filter((card) => card.kind !== "base"));
  }

  // The base, once: an adapter that is unloaded while it is picked leaves nothing picked, never silently the base.
  pickFirst(cards) {
    if (this.base !== null) return;
    this.base = cards.find((card) => card.kind === "base").id;
    this.rows.get(this.base).item.querySelector("input").checked = true;
  }

  add(name) {
    const row = { item: copyOf("model"), card: null };
    row.item.querySelector("input").value = name;
    row.item.querySelector(".alias").textContent = name;
    const unload = row.item.querySelector(".unload");
    unload.setAttribute("aria-label", `Unload ${name}`);
    unload.addEventListener("click", async () => {
      unload.disabled = true;
      await this.unload(row.card);
      unload.disabled = false;
    });
    this.rows.set(name, row);
    return row;
  }

  drop(name, row) {
    row.item.remove();
    this.rows.delete(name);
  }
}

function fill(item, { kind, residency, pinned, num_bytes: numBytes }) {
  const base = kind === "base";
  item.dataset.residency = residency;
  item.querySelector(".residency").textContent = residency;
  item.querySelector(".kind").textContent = kind || "not read yet";
  item.querySelector(".bytes").textContent = numBytes ? bytes(numBytes) : "";
  item.querySelector(".pinned").hidden = base || !pinned;
  item.querySelector(".unload").hidden = base;
}

function summary(adapters) {
  if (adapters.length === 0) return "No adapters yet.";
  const counts = PLACES.map((place) => `${adapters.filter(({ residency }) => residency === place).length} ${place}`);
  const resident = adapters.filter(({ residency }) => residency === "device");
  return `${counts.join(" · ")} · ${bytes(resident.reduce((sum, card) => sum + card.num_bytes, 0))} on the device`;
}
