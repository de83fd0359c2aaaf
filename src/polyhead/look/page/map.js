"use strict";
// The maps of the chosen heads, with tokens on their axes.
(() => {
  const { page } = window.polyhead;
  const panel = page.byId("maps");
  let view = null; // one for both maps of a comparison
  let figures = []; // what is drawn: the head's place, its canvas, its painted map, its frame

  const range = (at) => {
    const { edges } = window.polyhead.data.maps;
    const [first, last] = [edges[at], edges[at + 1] - 1];
    return first === last
      ? `“${page.quoted(first, 16)}” (${first})`
      : `tokens ${first}–${last} (“${page.quoted(first, 12)}” …)`;
  };

  // What the cell under the pointer says.
  const read = async (figure, event) => {
    const spot = place(figure, event);
    if (!spot) return;
    const map = await page.mapOf(figure.place);
    const [row, column] = [page.binOf(spot.query), page.binOf(spot.key)];
    const { edges } = window.polyhead.data.maps;
    const share = page.weightAt(map, row, column) * (edges[column + 1] - edges[column]);
    figure.says.textContent = `${range(row)} → ${range(column)}: ${page.share(share)}`;
  };

  const place = ({ canvas, frame }, event) => {
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left - frame.left) / frame.side;
    const y = (event.clientY - box.top - frame.above) / frame.side;
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return null;
    return { x, y, query: view.at(view.top, y), key: view.at(view.first, x) };
  };

  const redraw = () => {
    for (const figure of figures) {
      if (!figure.canvas.isConnected) continue;
      figure.frame = page.drawMap(figure.canvas, figure.painted, view);
      figure.canvas.classList.toggle("zoomed", !view.whole);
    }
  };

  const KEYS = {
    "+": () => view.zoom(1.6), "=": () => view.zoom(1.6), "-": () => view.zoom(1 / 1.6), "0": () => view.reset(),
    ArrowLeft: () => view.move(-0.15, 0), ArrowRight: () => view.move(0.15, 0),
    ArrowUp: () => view.move(0, -0.15), ArrowDown: () => view.move(0, 0.15),
  };

  const listen = (figure) => {
    const { canvas } = figure;
    let drag = null;
    canvas.addEventListener("keydown", (event) => {
      if (!(event.key in KEYS) || event.ctrlKey || event.metaKey) return;
      KEYS[event.key]();
      event.preventDefault();
      redraw();
    });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // else the page scrolls
      const spot = place(figure, event);
      event.preventDefault();
      view.zoom(Math.exp(-event.deltaY / 200), spot?.x, spot?.y);
      redraw();
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => {
      const spot = place(figure, event);
      if (spot) view.zoom(2, spot.x, spot.y);
      redraw();
    });
    canvas.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX, y: event.clientY, moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) return void read(figure, event);
      const [right, down] = [drag.x - event.clientX, drag.y - event.clientY];
      if (!drag.moved && Math.abs(right) + Math.abs(down) < 4) return;
      view.move(right / figure.frame.side, down / figure.frame.side);
      drag = { x: event.clientX, y: event.clientY, moved: true };
      redraw();
    });
    canvas.addEventListener("pointerup", (event) => {
      const spot = place(figure, event);
      if (drag && !drag.moved && spot) page.choose({ token: spot.query });
      drag = null;
    });
    canvas.addEventListener("pointercancel", () => (drag = null));
    canvas.addEventListener("pointerleave", () => (figure.says.textContent = figure.hint));
  };

  const tools = () => {
    const button = (text, label, act) => {
      const made = page.element("button", { type: "button", "aria-label": label, title: label }, text);
      made.addEventListener("click", () => {
        act();
        redraw();
      });
      return made;
    };
    return page.element(
      "div",
      { className: "tools" },
      page.element("span", { className: "note" }, "token ↓ looks at →"),
      button("+", "Zoom in", () => view.zoom(1.6)),
      button("−", "Zoom out", () => view.zoom(1 / 1.6)),
      button("All", "All of the map", () => view.reset()),
    );
  };

  const figureOf = (head, which, painted) => {
    const canvas = page.element("canvas", {
      className: "map",
      tabIndex: 0,
      role: "img",
      "aria-label": `Map of ${page.headName(head)}. ${page.sentence(head)} Plus and minus zoom, arrows move.`,
    });
    const hint = "Ctrl + wheel or double click zooms, drag moves, click picks a token.";
    const says = page.element("figcaption", { className: "note" }, hint);
    const title = page.element("p", { className: "map-title" }, page.headName(head));
    if (page.state.other !== null) title.style.color = page.ink(which);
    const figure = { place: head, canvas, says, hint, painted, frame: null };
    figure.element = page.element("figure", {}, ...(page.state.other === null ? [] : [title]), canvas, says);
    listen(figure);
    return figure;
  };

  // What the colors stand for.
  const swatches = (top) => {
    const one = (part) => {
      const square = page.element("i", { className: "swatch" });
      square.style.background = page.rampColor(page.brightness(part));
      return page.element("span", {}, square, page.share(part * top));
    };
    const { maps, tokens } = window.polyhead.data;
    const side = Math.round(tokens.length / (maps.edges.length - 1));
    const cell = side > 1 ? `a cell of ${side} × ${side} tokens` : "a cell of one or two tokens";
    const words = page.pooled() ? `mean weight in ${cell}` : "weight";
    return page.element("p", { className: "note swatches" }, words, ...[0.001, 0.01, 0.1, 1].map(one));
  };

  let built = "";
  const build = async () => {
    const { head, other } = page.state;
    const now = `${head} ${other}`;
    if (now === built) return redraw();
    built = now;
    const places = other === null ? [head] : [head, other];
    let maps = places.map(page.readMap);
    if (maps.includes(undefined)) {
      maps = await Promise.all(places.map(page.mapOf));
      if (built !== now) return; // another head was chosen meanwhile
    }
    panel.classList.toggle("two", places.length > 1);
    const top = Math.max(...maps.map((map) => map.scale)); // one scale for both
    figures = places.map((one, which) => figureOf(one, which, page.paintMap(maps[which], top)));
    panel.replaceChildren(tools(), ...figures.map(({ element }) => element), swatches(top));
    redraw();
  };

  page.on("data", () => {
    built = "";
    view = new page.View(window.polyhead.data.tokens.length);
  });
  page.on("theme", () => {
    built = "";
    build();
  });
  page.drawn = Promise.resolve();
  page.on("select", () => (page.drawn = build()));
  page.on("present", () => view && redraw());
  new ResizeObserver(() => view && redraw()).observe(panel);
})();
