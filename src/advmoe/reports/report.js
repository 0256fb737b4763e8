"use strict";

// Tables: a button in every column head. Rows without a value stay last, whichever way the others go.
const status = document.getElementById("status");

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? { text: cell.textContent.trim() } : { number: Number(cell.dataset.value) };
}

function compared(a, b, sign) {
  if (a.number !== undefined && b.number !== undefined) return sign * (a.number - b.number);
  if (a.number !== undefined || b.number !== undefined) return a.number !== undefined ? -1 : 1;
  return sign * a.text.localeCompare(b.text, "en", { numeric: true });
}

function sortBy(table, head) {
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.indexOf(head);
  const [first, second] = head.classList.contains("number") ? ["descending", "ascending"] : ["ascending", "descending"];
  const direction = head.getAttribute("aria-sort") === first ? second : first;
  const sign = direction === "ascending" ? 1 : -1;
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", direction);
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => compared(valueOf(a, column), valueOf(b, column), sign));
  table.tBodies[0].append(...rows);
  status.textContent = `Sorted by ${head.textContent.trim()}, ${direction}`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, head));
    head.append(button);
  }
}

// Gallery: one run at a time.
const chooser = document.getElementById("run");

function showRun() {
  for (const images of document.querySelectorAll(".images")) images.hidden = images.id !== `images-${chooser.value}`;
}

if (chooser) {
  chooser.closest(".chooser").hidden = false;
  chooser.addEventListener("change", showRun);
  showRun();
}
