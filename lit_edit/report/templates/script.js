"use strict";
document.documentElement.classList.add("js");

// Search and state of a table.
for (const tools of document.querySelectorAll(".tools")) {
  const table = document.getElementById(tools.dataset.for);
  const rows = Array.from(table.tBodies[0].rows);
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const search = tools.querySelector("input"), state = tools.querySelector("select");
  const count = tools.querySelector(".count"), all = count.textContent;
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), wanted = state ? state.value : "";
    let shown = 0;
    rows.forEach((row, i) => {
      const fits = words.every((word) => texts[i].includes(word)) && (!wanted || row.dataset.state === wanted);
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    });
    count.textContent = shown === rows.length ? all : shown + " of " + all;
  };
  search.addEventListener("input", filter);
  if (state) state.addEventListener("change", filter);
  filter();
}

// Columns sort when their heading is clicked.
const key = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.sort !== undefined ? cell.dataset.sort : cell.textContent.trim();
};
for (const table of document.querySelectorAll("table.wide")) {
  if (table.tBodies[0].rows.length < 3) continue;
  Array.from(table.tHead.rows[0].cells).forEach((heading, column) => {
    heading.setAttribute("aria-sort", "none");
    heading.tabIndex = 0;
    const sort = () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = Array.from(table.tBodies[0].rows);
      const numeric = rows.every((row) => key(row, column) !== "" && !isNaN(key(row, column)));
      rows.sort((a, b) => {
        const x = key(a, column), y = key(b, column);
        const order = numeric ? x - y : x.localeCompare(y);
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    };
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}

// What a chart says below the pointer.
const tip = document.getElementById("tip");
const show = (event, text) => {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4)) + "px";
};
for (const plot of document.querySelectorAll("svg.plot")) {
  const names = Array.from(plot.parentElement.querySelectorAll(".legend li")).map((item) => {
    const text = item.querySelector("span").cloneNode(true);
    text.querySelectorAll("b").forEach((value) => value.remove());
    return text.textContent.trim();
  });
  const cursor = plot.querySelector(".cursor"), data = plot.dataset.hover ? JSON.parse(plot.dataset.hover) : null;
  const height = plot.viewBox.baseVal.height;
  const dots = data ? [] : Array.from(plot.querySelectorAll("circle.dot")).map((dot) => {
    const title = dot.querySelector("title"), said = title.textContent;
    title.remove(); // the browser's own tip would stand beside ours
    return { x: dot.cx.baseVal.value, y: dot.cy.baseVal.value, said };
  });
  if (data) plot.querySelectorAll("circle title").forEach((title) => title.remove());
  const hide = () => { tip.hidden = true; cursor.setAttribute("d", ""); };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointercancel", hide);
  plot.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    if (data) {
      let best = 0;
      data.x.forEach((x, i) => { if (Math.abs(x - at.x) < Math.abs(data.x[best] - at.x)) best = i; });
      const lines = data.s.map((s, i) => (s.y[best] ? names[i] + ": " + s.y[best] : "")).filter(Boolean);
      cursor.setAttribute("d", "M" + data.x[best] + " 14V" + (height - 42));
      show(event, data.n[best] + " " + plot.dataset.xLabel + "\n" + lines.join("\n"));
      return;
    }
    let best = null, near = 14 * 14;
    for (const dot of dots) {
      const far = (dot.x - at.x) ** 2 + (dot.y - at.y) ** 2;
      if (far < near) { near = far; best = dot; }
    }
    if (best) show(event, best.said); else hide();
  });
}
