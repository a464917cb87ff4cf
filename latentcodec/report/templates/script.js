"use strict";
// Pictures pixel by pixel, whatever the density of the screen; a viewer for two pictures; tables that sort; the map.
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const density = () => window.devicePixelRatio || 1;

// 0: twice as large where that fits beside another picture, else as it is
const zoomOf = image => Number(image.dataset.zoom) || (window.innerWidth > 900 && image.naturalWidth <= 600 ? 2 : 1);
function showExactly(image) {
  const show = () => { if (image.naturalWidth) image.style.width = image.naturalWidth * zoomOf(image) / density() + "px"; };
  image.complete ? show() : image.addEventListener("load", show);
}
document.querySelectorAll(".pictures img.exact").forEach(showExactly);

function press(buttons, chosen) {
  buttons.forEach(button => button.setAttribute("aria-pressed", String(button === chosen)));
}

function startViewer(figure) {
  const samples = JSON.parse(figure.dataset.samples);
  const find = name => figure.querySelector(name);
  const [under, over, pan, divider, left, right] = [".under", ".over", ".pan", ".divider", ".left", ".right"].map(find);
  const modes = [...figure.querySelectorAll("[data-mode]")], zooms = [...figure.querySelectorAll("[data-zoom]")];
  let sample = samples[0], mode = "slider", timer = null;
  let zoom = Number(figure.dataset.start) || (window.innerWidth > 900 ? 2 : 1);

  function draw() {
    const choose = select => sample.choices[select.selectedIndex] || sample.choices[0];
    for (const [image, select] of [[under, left], [over, right]]) {
      image.src = pictures[choose(select).picture];
      image.alt = choose(select).label;
    }
    under.onload = () => {
      pan.style.width = under.naturalWidth * zoom / density() + "px";
      pan.style.height = under.naturalHeight * zoom / density() + "px";
    };
    if (under.complete && under.naturalWidth) under.onload();
    clearInterval(timer);
    figure.classList.toggle("difference", mode === "difference");
    over.style.visibility = "visible";
    over.style.clipPath = mode === "slider" ? `inset(0 0 0 ${divider.value}%)` : "none";
    divider.hidden = mode !== "slider";
    if (mode === "flicker")
      timer = setInterval(() => { over.style.visibility = over.style.visibility === "hidden" ? "visible" : "hidden"; }, 450);
  }

  function pick(next, button) {
    const places = [left.selectedIndex, right.selectedIndex];
    sample = next;
    for (const [select, place, usual] of [[left, places[0], 0], [right, places[1], 1]]) {
      select.replaceChildren(...sample.choices.map(choice => new Option(choice.label)));
      select.selectedIndex = place >= 0 && place < sample.choices.length ? place : Math.min(usual, sample.choices.length - 1);
    }
    press(buttons, button);
    draw();
  }

  const buttons = samples.map(item => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = item.label;
    button.addEventListener("click", () => pick(item, button));
    find(".samples").append(button);
    return button;
  });
  modes.forEach(button => button.addEventListener("click", () => { mode = button.dataset.mode; press(modes, button); draw(); }));
  zooms.forEach(button => button.addEventListener("click", () => { zoom = Number(button.dataset.zoom); press(zooms, button); draw(); }));
  [left, right].forEach(select => select.addEventListener("change", draw));
  divider.addEventListener("input", draw);
  press(zooms, zooms.find(button => Number(button.dataset.zoom) === zoom));
  pick(samples[0], buttons[0]);
}
document.querySelectorAll(".viewer").forEach(startViewer);

function startAtlas(figure) {
  const grid = Number(figure.dataset.grid), map = figure.querySelector(".map"), tile = figure.querySelector(".tile");
  const sheet = figure.querySelector(".sheet");
  tile.style.backgroundImage = `url(${sheet.src})`;
  tile.style.backgroundSize = `${grid * 100}% ${grid * 100}%`;
  map.addEventListener("pointermove", event => {
    const box = map.getBoundingClientRect();
    const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
      .map(share => Math.min(grid - 1, Math.max(0, Math.floor(share * grid))));
    tile.style.backgroundPosition = place.map(index => `${100 * index / (grid - 1)}%`).join(" ");
    tile.dataset.place = place.join(",");
  });
}
document.querySelectorAll(".atlas").forEach(startAtlas);

function makeSortable(table) {
  const body = table.tBodies[0];
  if (body.rows.length < 3) return;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    button.title = "Sort by this column";
    head.replaceChildren(button);
    let rising = false;
    button.addEventListener("click", () => {
      rising = !rising;
      const value = row => { const text = row.cells[column].textContent, number = text === "infinite" ? Infinity : parseFloat(text); return isNaN(number) ? text : number; };
      const rank = x => typeof x === "number" ? 0 : 1;  // numbers before words such as "-", which compare with none
      const order = (a, b) => { const [x, y] = [value(a), value(b)]; return rank(x) - rank(y) || (x < y ? -1 : x > y ? 1 : 0); };
      body.append(...[...body.rows].sort((a, b) => rising ? order(a, b) : order(b, a)));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    });
  });
}
document.querySelectorAll("table.sortable").forEach(makeSortable);
