"use strict";

// Tables: a button in every column head sorts the rows. Rows without a value stay last in both directions.
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

// Epsilon slider: sets the epsilon of all images of the run, and highlights their pathways layer by layer.
const timers = new WeakMap(); // route -> its running interval
const reducedMotion = window.matchMedia("(prefers-reduced-motion: reduce)");

function light(route) {
  const layers = [...route.children];
  clearInterval(timers.get(route));
  layers.forEach((layer) => layer.classList.toggle("unlit", !reducedMotion.matches));
  if (reducedMotion.matches) return;
  let next = 0;
  timers.set(route, setInterval(() => {
    layers[next].classList.remove("unlit");
    next += 1;
    if (next === layers.length) clearInterval(timers.get(route));
  }, 60));
}

function showStep(input) {
  const words = input.dataset.radii.split("|")[input.value];
  input.setAttribute("aria-valuetext", words);
  input.closest(".slider").querySelector("output").textContent = words;
  for (const step of input.closest(".images").querySelectorAll(".step")) {
    step.hidden = step.dataset.step !== input.value;
    if (!step.hidden) step.querySelectorAll(".route").forEach(light);
  }
}

for (const input of document.querySelectorAll(".slider input")) {
  input.closest(".slider").hidden = false;
  input.value = input.defaultValue; // browsers keep the position of an earlier visit
  input.setAttribute("aria-valuetext", input.dataset.radii.split("|")[input.value]);
  input.addEventListener("input", () => showStep(input));
}
