// Which expert served a token, and with what share of the weight: beside the token that is pointed at or has the focus.

const GAP = 6; // pixels

export function bindTip(tip, area) {
  let shown = null;

  function show(event) {
    const token = event.target.closest("[data-expert]");
    if (token === null) return;
    hide();
    shown = token;
    tip.textContent = `${token.dataset.expert} · ${Math.round(100 * token.dataset.share)}%`;
    tip.hidden = false;
    token.setAttribute("aria-describedby", tip.id);
    place(tip, token);
  }

  function hide() {
    shown?.removeAttribute("aria-describedby");
    shown = null;
    tip.hidden = true;
  }

  for (const kind of ["pointerover", "focusin"]) area.addEventListener(kind, show);
  for (const kind of ["pointerout", "focusout"]) area.addEventListener(kind, hide);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("scroll", () => shown && place(tip, shown), true);
  new MutationObserver(() => shown?.isConnected === false && hide()).observe(area, { childList: true });
}

// Above the token's first line, below it where there is no room, and never out of the window.
function place(tip, token) {
  const { left, top, bottom, width } = token.getClientRects()[0];
  const over = top - tip.offsetHeight - GAP;
  const most = document.documentElement.clientWidth - tip.offsetWidth - GAP;
  tip.style.left = `${Math.max(GAP, Math.min(left + (width - tip.offsetWidth) / 2, most))}px`;
  tip.style.top = `${over < GAP ? bottom + GAP : over}px`;
}
