"use strict";
// Sorting: a click on a column's head. Numbers by their value, everything else by the alphabet.
const value = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/[,\s]/g, ""));
  return Number.isNaN(number) ? text : number;
};
const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
    const first = head.classList.contains("l") ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const each of head.parentNode.cells) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    body.append(...[...body.rows].sort((a, b) => sign * compare(value(a, column), value(b, column))));
  });
}

// A figure is one stop of the Tab key; arrows go from mark to mark, whose exact numbers are shown beside it.
const note = document.getElementById("note");
const show = (mark, x, y) => {
  note.textContent = mark.dataset.note;
  note.hidden = false;
  note.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - note.offsetWidth - 4))}px`;
  note.style.top = `${y + 14 + note.offsetHeight > innerHeight ? Math.max(4, y - note.offsetHeight - 10) : y + 14}px`;
};
for (const plot of document.querySelectorAll("svg.plot")) {
  const marks = [...plot.querySelectorAll(".mark")];
  marks.forEach((mark, i) => {
    const title = mark.querySelector("title");
    mark.dataset.note = title.textContent;
    title.remove();
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", mark.dataset.note);
    mark.setAttribute("tabindex", i ? "-1" : "0");
    mark.addEventListener("pointermove", event => show(mark, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", () => { note.hidden = true; });
    mark.addEventListener("blur", () => { note.hidden = true; });
    mark.addEventListener("focus", () => {
      const box = mark.getBoundingClientRect();
      show(mark, box.left + box.width / 2, box.top + box.height / 2);
    });
    mark.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = event.key === "Home" ? 0 : event.key === "End" ? marks.length - 1 : step && i + step;
      if (event.key === "Escape") note.hidden = true;
      if (next === undefined || !marks[next]) return;
      event.preventDefault();
      mark.setAttribute("tabindex", "-1");
      marks[next].setAttribute("tabindex", "0");
      marks[next].focus();
    });
  });
}

// The ranking of units, made again for the format that is chosen; without a script it stays that of the first choice.
const data = document.getElementById("data");
if (data) {
  const { units, formats, losses, saved } = JSON.parse(data.textContent);
  const table = document.getElementById("ranking"), body = table.tBodies[0];
  const digits = number => Number(number.toPrecision(4)).toString();
  for (const input of document.querySelectorAll(".chooser input")) {
    input.addEventListener("change", () => {
      const f = formats.indexOf(input.value);
      const rows = units.map((name, u) => [name, losses[u][f], saved[u][f]]).filter(row => row[1] !== null);
      const total = rows.reduce((sum, row) => sum + row[1], 0) || 1;
      const price = row => row[2] > 0 ? row[1] / row[2] * 1048576 : Infinity;
      rows.sort((a, b) => price(b) - price(a));
      body.replaceChildren(...rows.map(row => {
        const line = document.createElement("tr");
        const cells = [row[0], digits(row[1]), row[2].toLocaleString("en"), row[2] > 0 ? digits(price(row)) : "–",
          `${(100 * row[1] / total).toFixed(1)} %`];
        cells.forEach((text, i) => {
          const cell = line.insertCell();
          cell.textContent = text;
          if (!i) cell.className = "l";
        });
        return line;
      }));
      for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
    });
  }
}
