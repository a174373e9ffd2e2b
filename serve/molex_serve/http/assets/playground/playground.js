// The page at /: puts its parts together. Each file beside this one is one of them; the page is index.html.

import { byId, tell } from "./elements.js";
import { bindKeys } from "./keys.js";
import { bindLoading, unload } from "./loading.js";
import { ModelList } from "./models.js";
import { listModels } from "./server.js";
import { Talk } from "./talk.js";
import { bindTip } from "./tip.js";
import { bindWalking } from "./walking.js";
import { Watch } from "./watch.js";

const LOOK_SECONDS = 2;

const models = new ModelList(byId("models"), (card) => unload(card, () => watch.now()));
const watch = new Watch(listModels, showModels, failed, LOOK_SECONDS);

function showModels(cards) {
  tell(byId("models-problem"), null);
  models.show(cards);
}

// Without a key there is no use in looking again before one is typed.
function failed(error) {
  tell(byId("models-problem"), error);
  const locked = error.status === 401 || error.status === 403;
  if (locked) byId("keys-panel").open = true;
  return !locked;
}

bindKeys(byId("keys"), () => watch.now());
bindLoading(byId("load"), () => watch.now());
bindTip(byId("tip"), byId("answers"));
bindWalking(byId("answers"));
new Talk(byId("ask"), models, () => watch.now()).bind();
watch.now();
