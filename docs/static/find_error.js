// errors.html: shows the messages that share most words with what was pasted, best first
const words = (text) => new Set(text.toLowerCase().match(/[\p{L}_]{2,}/gu) || []);

function find(pasted, items, found) {
  const asked = words(pasted);
  const ranked = items
    .map((item) => {
      const own = words(item.querySelector("code").textContent);
      const shared = [...own].filter((word) => asked.has(word)).length;
      return { item, shared, score: (shared * shared) / own.size };
    })
    .filter(({ shared }) => shared > 1)
    .sort((a, b) => b.score - a.score);
  found.replaceChildren(
    ...ranked.slice(0, 5).map(({ item }) => {
      const copy = item.cloneNode(true);
      copy.firstElementChild.append(" (", item.closest("section").querySelector("p a").cloneNode(true), ")");
      return copy;
    }),
  );
}

document.addEventListener("DOMContentLoaded", () => {
  const input = document.getElementById("message");
  if (!input) return;
  const items = [...document.querySelectorAll("#messages ~ section li, #messages section li")];
  const found = document.getElementById("found");
  input.addEventListener("input", () => find(input.value, items, found));
  input.value = new URLSearchParams(location.search).get("message") || "";
  if (input.value) find(input.value, items, found);
});
