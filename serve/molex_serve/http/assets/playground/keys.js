// The two keys. They stay in this tab: its session storage ends with it, and nothing else on this page keeps them.

export function bindKeys(form, changed) {
  for (const input of form.elements) {
    input.value = sessionStorage.getItem(input.name) ?? "";
    input.addEventListener("change", () => {
      sessionStorage.setItem(input.name, input.value.trim());
      changed();
    });
  }
  form.addEventListener("submit", (event) => event.preventDefault());
}

// The header that a request carries. Where only one of the keys was given, it is worth a try.
export function authorization(admin) {
  const [first, second] = admin ? ["admin-key", "api-key"] : ["api-key", "admin-key"];
  const key = sessionStorage.getItem(first) || sessionStorage.getItem(second);
  return key ? { Authorization: `Bearer ${bytesAsText(key)}` } : {};
}

// Headers are bytes, one for each character; the server compares UTF-8.
function bytesAsText(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}
