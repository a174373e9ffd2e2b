// The page's own elements. All markup is in index.html; scripts fill in texts, which are never read as HTML.

export const byId = (id) => document.getElementById(id);

export const copyOf = (template) => byId(template).content.firstElementChild.cloneNode(true);

// An error in the server's words, or nothing where there is none.
export function tell(element, error) {
  element.textContent = error === null ? "" : error.message;
}
