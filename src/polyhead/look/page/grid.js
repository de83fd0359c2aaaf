"use strict";
// The grid of heads: a row a layer, or all in the order of a number; one tile takes the focus.
(() => {
  const { page } = window.polyhead;
  const grid = page.byId("grid");
  let lines = []; // rows of places in data.heads, null where there is no head
  let tiles = new Map(); // place -> gridcell

  const byLayer = (data) =>
    data.layers.map(({ index }) => {
      const line = [];
      data.heads.forEach(([layer, head], place) => {
        if (layer === index) line[head] = place;
      });
      return Array.from(line, (place) => place ?? null);
    });

  const ordered = (data, name, columns) => {
    const numbers = data.numbers[name];
    const places = data.heads.map((_, place) => place);
    const shown = places.filter((place) => !page.state.hidden.has(data.kinds[place]));
    shown.sort((one, two) => (numbers[two] ?? -Infinity) - (numbers[one] ?? -Infinity));
    return Array.from({ length: Math.ceil(shown.length / columns) }, (_, line) =>
      shown.slice(line * columns, (line + 1) * columns),
    );
  };

  const label = (place) => {
    const { state } = page;
    const text = `${page.headName(place)}, ${window.polyhead.data.kinds[place]}. ${page.sentence(place)}`;
    const number = state.color === "kind" ? state.order : state.color;
    return number in window.polyhead.data.numbers
      ? `${text} ${page.labelOf(number)}: ${page.amount(number, page.numberOf(number, place))}`
      : text;
  };

  const tile = (place, captioned) => {
    const canvas = page.element("canvas", { "aria-hidden": "true" });
    canvas.dataset.place = place;
    const cell = page.element("div", { role: "gridcell", className: "tile", tabIndex: -1, "aria-selected": "false" }, canvas);
    cell.dataset.place = place;
    if (captioned) cell.append(page.element("span", { className: "caption" }, page.shortName(place)));
    tiles.set(place, cell);
    return cell;
  };

  const build = () => {
    const { data } = window.polyhead;
    const { order } = page.state;
    const columns = 1 + Math.max(...data.heads.map(([, head]) => head));
    const layered = order === "layer" || !data.numbers[order];
    lines = layered ? byLayer(data) : ordered(data, order, columns);
    tiles = new Map();
    const rows = lines.map((line, at) => {
      const heading = layered ? data.layers[at].index : at * columns + 1;
      const head = page.element("div", { role: "rowheader", className: "row-head" }, String(heading));
      if (layered) head.setAttribute("aria-label", `Layer ${heading}`);
      else head.setAttribute("aria-label", `From rank ${heading}`);
      const cells = line.map((place) =>
        place === null ? page.element("div", { role: "gridcell" }) : tile(place, !layered),
      );
      return page.element("div", { role: "row", className: "row" }, head, ...cells);
    });
    const names = Array.from({ length: columns }, (_, head) =>
      page.element("div", { role: "columnheader" }, layered ? String(head) : ""),
    );
    const corner = page.element("div", { role: "columnheader", className: "row-head" }, layered ? "layer" : "rank");
    grid.style.setProperty("--columns", columns);
    grid.replaceChildren(
      page.element("div", { role: "row", className: "row names" }, corner, ...names),
      ...rows,
    );
    page.thumbs([...tiles.values()].map((cell) => cell.firstChild));
    dress();
    mark();
  };

  const frame = (place) => {
    const { data } = window.polyhead;
    const { color } = page.state;
    if (!data.numbers[color]) return page.kindColor(data.kinds[place]);
    const value = page.numberOf(color, place);
    if (value === null) return "transparent";
    const { least, most } = page.rangeOf(color);
    return page.rampColor(0.12 + (0.88 * (value - least)) / (most - least || 1));
  };

  // Colors, labels and what is filtered, on the tiles that are there.
  const dress = () => {
    const { data } = window.polyhead;
    const { hidden } = page.state;
    for (const [place, cell] of tiles) {
      cell.classList.toggle("dim", hidden.has(data.kinds[place]));
      cell.title = label(place);
      cell.setAttribute("aria-label", cell.title);
      cell.style.setProperty("--frame", frame(place));
    }
    const dimmed = data.kinds.filter((kind) => hidden.has(kind)).length;
    page.byId("found").textContent = dimmed
      ? `${data.heads.length - dimmed} of ${data.heads.length} heads`
      : "";
  };

  const mark = () => {
    const { head, other } = page.state;
    for (const cell of grid.querySelectorAll('[aria-selected="true"], [tabindex="0"]')) {
      cell.setAttribute("aria-selected", "false");
      cell.tabIndex = -1;
    }
    for (const place of [head, other]) tiles.get(place)?.setAttribute("aria-selected", "true");
    const current = tiles.get(other ?? head) ?? tiles.values().next().value;
    if (current) current.tabIndex = 0;
  };

  const take = (place) => {
    const { state } = page;
    if (!state.comparing) page.choose({ head: place });
    else if (place !== state.head) page.choose({ other: place });
  };

  const STEPS = {
    ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    PageUp: [-5, 0], PageDown: [5, 0], Home: [0, -1e6], End: [0, 1e6],
  };

  // The next head that way, over holes; in a line, from its end to the next line's start no more.
  const neighbour = (place, [down, right]) => {
    let line = lines.findIndex((places) => places.includes(place));
    let column = lines[line].indexOf(place);
    const inside = (value, length) => Math.min(Math.max(value, 0), length - 1);
    do {
      const before = [line, column];
      line = inside(line + down, lines.length);
      column = inside(column + right, lines[line].length);
      if (before[0] === line && before[1] === column) return null;
    } while (lines[line][column] === null);
    return lines[line][column];
  };

  grid.addEventListener("click", (event) => {
    const cell = event.target.closest(".tile");
    if (!cell) return;
    take(Number(cell.dataset.place));
    cell.focus({ preventScroll: true });
    page.emit("picked");
  });
  grid.addEventListener("keydown", (event) => {
    const cell = event.target.closest(".tile");
    if (!cell || event.altKey || event.metaKey || event.ctrlKey) return;
    const place = Number(cell.dataset.place);
    if (event.key in STEPS) {
      const next = neighbour(place, STEPS[event.key]);
      if (next !== null) {
        take(next);
        tiles.get(next).focus();
      }
    } else if (event.key === "Enter" || event.key === " ") {
      take(place);
      page.emit("picked");
      page.emit("enter-text");
    } else if (event.key === "Escape") {
      page.choose({ comparing: false, other: null });
    } else return;
    event.preventDefault();
  });

  page.focusGrid = () => (tiles.get(page.state.other ?? page.state.head) ?? grid).focus();
  page.on("data", build);
  page.on("order", build);
  page.on("theme", () => {
    page.thumbs([...tiles.values()].map((cell) => cell.firstChild));
    dress();
  });
  page.on("select", mark);
  page.on("present", dress);
})();
