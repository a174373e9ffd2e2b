// Adapters come and go, by the administration's routes.

import { byId, tell } from "./elements.js";
import { loadAdapter, unloadAdapter } from "./server.js";
import { bytes } from "./sizes.js";

export function bindLoading(form, changed) {
  const { alias, path, pin } = form.elements;
  const button = form.querySelector("button");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    tell(byId("load-problem"), null);
    byId("load-status").textContent = `Loading ${alias.value}…`;
    try {
      const made = await loadAdapter(alias.value.trim(), path.value.trim(), pin.checked);
      byId("load-status").textContent = `Loaded ${made.alias}: ${made.kind}, ${bytes(made.num_bytes)}.`;
      form.reset();
    } catch (error) {
      byId("load-status").textContent = "";
      tell(byId("load-problem"), error);
    }
    button.disabled = false;
    changed();
  });
}

export async function unload(card, changed) {
  tell(byId("unload-problem"), null);
  try {
    await unloadAdapter(card);
  } catch (error) {
    tell(byId("unload-problem"), error);
  }
  await changed();
}
