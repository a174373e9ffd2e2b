// The arrow keys go from token to token; the tab key stops once in a text, where they left off.

const STEPS = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };

export function bindWalking(area) {
  area.addEventListener("keydown", (event) => {
    const here = event.target.closest("[data-expert]");
    if (here === null || !(event.key in STEPS)) return;
    const tokens = [...here.parentElement.querySelectorAll("[data-expert]")];
    const place = tokens.indexOf(here) + STEPS[event.key];
    event.preventDefault();
    step(here, tokens[Math.max(0, Math.min(place, tokens.length - 1))]);
  });
}

function step(from, to) {
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}
