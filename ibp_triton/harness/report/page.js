"use strict";
// Sorting, tips and legends; without it the page has the same content, and an SVG's own titles are its tips.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (down ? -1 : 1) * compare(a.cells[column].textContent, b.cells[column].textContent));
      table.tBodies[0].append(...rows);
    });
  });
}

// By the number that stands first, or after "p ="; texts by their letters; empty cells first.
function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  if (Number.isNaN(x) && Number.isNaN(y)) return a.localeCompare(b);
  if (Number.isNaN(x)) return -1;
  if (Number.isNaN(y)) return 1;
  return x - y;
}

function number(text) {
  const plain = text.trim().replaceAll("−", "-");
  const found = /p [=<] ([-+.\de]+)/.exec(plain) || /^([-+]?\.?\d[\d.]*(?:e[-+]?\d+)?)/.exec(plain);
  return found ? Number.parseFloat(found[1]) : Number.NaN;
}

// Tips: an SVG's titles, shown at once and on touch.
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
for (const title of document.querySelectorAll("figure svg title")) {
  const point = title.parentNode;
  if (point.ownerSVGElement === null) continue;
  point.dataset.tip = title.textContent;
  point.setAttribute("aria-label", title.textContent);
  title.remove();
}
function show(event) {
  const point = event.target.closest ? event.target.closest("[data-tip]") : null;
  tip.hidden = point === null;
  if (point === null) return;
  tip.textContent = point.dataset.tip;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, room))}px`;
  tip.style.top = `${event.clientY + 14}px`;
}
document.addEventListener("pointerover", show);
document.addEventListener("pointerdown", show);

// Legends: the ids of a series end in --s1 (points), --b1 (band), --w1 and --v1 (whiskers), --l1 and --t1 (legend).
for (const text of document.querySelectorAll('figure svg [id*="--t"]')) {
  const [name, series] = text.id.split("--t");
  const find = (kind) => document.getElementById(`${name}--${kind}${series}`);
  const keys = [text, find("l")].filter((one) => one !== null);
  text.setAttribute("role", "switch");
  text.setAttribute("tabindex", "0");
  text.setAttribute("aria-checked", "true");
  const toggle = () => {
    const off = text.getAttribute("aria-checked") === "true";
    text.setAttribute("aria-checked", String(!off));
    for (const kind of ["s", "b", "w", "v"]) {
      const part = find(kind);
      if (part !== null) part.style.display = off ? "none" : "";
    }
    for (const key of keys) key.style.opacity = off ? "0.35" : "";
  };
  for (const key of keys) {
    key.style.cursor = "pointer";
    key.addEventListener("click", toggle);
  }
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    toggle();
  });
}
