"use strict";
// The maps of the chosen heads, with tokens on their axes.
(() => {
  const { page } = window.polyhead;
  const FONT = "11px system-ui, sans-serif";
  const panel = page.byId("maps");
  let [LEFT, ABOVE] = [0, 0]; // room for names on the axes
  let view = null; // one for both maps of a comparison
  let figures = [];

  const bin = (token) => {
    const { edges } = window.polyhead.data.maps;
    let low = 0;
    let high = edges.length - 2;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (edges[middle] <= token) low = middle;
      else high = middle - 1;
    }
    return low;
  };

  const named = () => view.size <= 400;

  // The whole map as an image of a pixel a cell; `top` is the weight that is brightest.
  const paint = (map, top) => {
    const image = new ImageData(map.n, map.n);
    const ramp = page.ramp();
    const lookup = Array.from({ length: map.levels + 1 }, (_, code) => {
      const weight = map.scale * (code / map.levels) ** 2;
      return 3 * Math.round(255 * page.brightness(Math.min(1, weight / top)));
    });
    for (let cell = 0; cell < map.codes.length; cell++) {
      const colour = lookup[map.codes[cell]];
      for (let c = 0; c < 3; c++) image.data[4 * cell + c] = ramp[colour + c];
      image.data[4 * cell + 3] = 255;
    }
    const canvas = page.element("canvas", { width: map.n, height: map.n });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  };

  const draw = (figure) => {
    const { canvas, painted } = figure;
    if (!painted || !canvas.isConnected) return;
    [LEFT, ABOVE] = named() ? [72, 58] : [40, 34];
    const ratio = window.devicePixelRatio || 1;
    const outer = canvas.clientWidth;
    const side = outer - LEFT - 2;
    figure.side = side;
    canvas.height = Math.round((side + ABOVE + 2) * ratio);
    canvas.width = Math.round(outer * ratio);
    const context = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    context.scale(ratio, ratio);
    context.font = FONT;
    const { edges } = window.polyhead.data.maps;
    const scale = side / view.size;
    context.save();
    context.beginPath();
    context.rect(LEFT, ABOVE, side, side);
    context.clip();
    context.imageSmoothingEnabled = false;
    drawCells(context, figure, edges, scale);
    drawToken(context, style.color, side, scale);
    context.restore();
    context.strokeStyle = style.getPropertyValue("border-top-color");
    context.lineWidth = 1;
    context.strokeRect(LEFT - 0.5, ABOVE - 0.5, side + 1, side + 1);
    drawNames(context, style.color, side, scale);
  };

  // Bins are not all of one size, so each is drawn where its tokens are.
  const drawCells = (context, { painted }, edges, scale) => {
    const [left, right] = [bin(view.first), bin(view.first + view.size - 1e-6)];
    const [top, bottom] = [bin(view.top), bin(view.top + view.size - 1e-6)];
    const even = edges.length - 1 === view.tokens || view.whole;
    if (even) {
      const n = edges.length - 1;
      const cell = (view.tokens / n) * scale;
      const [x, y] = [LEFT - view.first * scale, ABOVE - view.top * scale];
      context.drawImage(painted, x, y, n * cell, n * cell);
      return;
    }
    for (let row = top; row <= bottom; row++) {
      const y = ABOVE + (edges[row] - view.top) * scale;
      const height = (edges[row + 1] - edges[row]) * scale;
      for (let column = left; column <= right; column++) {
        const x = LEFT + (edges[column] - view.first) * scale;
        const width = (edges[column + 1] - edges[column]) * scale;
        context.drawImage(painted, column, row, 1, 1, x, y, width + 0.5, height + 0.5);
      }
    }
  };

  // The row of the chosen token, where it looks, and its column, who looks at it.
  const drawToken = (context, colour, side, scale) => {
    const { token, mode, other } = page.state;
    if (token === null) return;
    const width = Math.max(scale, 1) + 1.5;
    context.lineWidth = 1.5;
    if (mode !== "from") {
      context.strokeStyle = other === null ? page.hue(0) : colour;
      context.strokeRect(LEFT - 2, ABOVE + (token - view.top) * scale - 0.75, side + 4, width);
    }
    if (mode === "from" || (mode === "both" && other === null)) {
      context.strokeStyle = other === null ? page.hue(1) : colour;
      context.strokeRect(LEFT + (token - view.first) * scale - 0.75, ABOVE - 2, width, side + 4);
    }
  };

  const drawNames = (context, colour, side, scale) => {
    context.fillStyle = colour;
    context.textBaseline = "middle";
    const centre = (token, start) => (token + 0.5 - start) * scale;
    const name = (token) => (named() ? page.quoted(token, 10) : String(token));
    context.textAlign = "right";
    for (const token of view.ticks(view.top, side / 15)) {
      context.fillText(name(token), LEFT - 6, ABOVE + centre(token, view.top), LEFT - 8);
    }
    context.textAlign = "left";
    for (const token of view.ticks(view.first, side / 15)) {
      context.save();
      context.translate(LEFT + centre(token, view.first), ABOVE - 5);
      context.rotate(-Math.PI / 2.6);
      context.fillText(name(token), 0, 0, ABOVE + 6);
      context.restore();
    }
  };

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
    const [row, column] = [bin(spot.query), bin(spot.key)];
    const { edges } = window.polyhead.data.maps;
    const share = page.weightAt(map, row, column) * (edges[column + 1] - edges[column]);
    figure.says.textContent = `${range(row)} → ${range(column)}: ${page.share(share)}`;
  };

  const place = ({ canvas, side }, event) => {
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left - LEFT) / side;
    const y = (event.clientY - box.top - ABOVE) / side;
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return null;
    return { x, y, query: view.at(view.top, y), key: view.at(view.first, x) };
  };

  const redraw = () => {
    for (const figure of figures) {
      draw(figure);
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
      view.move(right / figure.side, down / figure.side);
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
      button("All", "The whole map", () => view.reset()),
    );
  };

  const figureOf = (head, which) => {
    const canvas = page.element("canvas", {
      className: "map",
      tabIndex: 0,
      role: "img",
      "aria-label": `Map of ${page.headName(head)}. ${page.sentence(head)} Plus and minus zoom, arrows move.`,
    });
    const hint = "Ctrl + wheel or double click zooms, drag moves, click picks a token.";
    const says = page.element("figcaption", { className: "note" }, hint);
    const title = page.element("p", { className: "map-title" }, page.headName(head));
    if (page.state.other !== null) title.style.color = page.hue(which);
    const figure = { place: head, canvas, says, hint, painted: null, side: 1 };
    figure.element = page.element("figure", {}, ...(page.state.other === null ? [] : [title]), canvas, says);
    listen(figure);
    return figure;
  };

  // What the colours stand for.
  const swatches = (top) => {
    const one = (part) => {
      const square = page.element("i", { className: "swatch" });
      square.style.background = page.rampColour(page.brightness(part));
      return page.element("span", {}, square, page.share(part * top));
    };
    const words = page.pooled() ? "mean weight in a cell" : "weight";
    return page.element("p", { className: "note swatches" }, words, ...[0.001, 0.01, 0.1, 1].map(one));
  };

  let built = "";
  const build = async () => {
    const { head, other } = page.state;
    const now = `${head} ${other}`;
    if (now === built) return redraw();
    built = now;
    const places = other === null ? [head] : [head, other];
    const maps = await Promise.all(places.map(page.mapOf));
    if (built !== now) return; // another head was chosen meanwhile
    figures = places.map(figureOf);
    panel.classList.toggle("two", places.length > 1);
    const top = Math.max(...maps.map((map) => map.scale));
    panel.replaceChildren(tools(), ...figures.map(({ element }) => element), swatches(top));
    figures.forEach((figure, at) => (figure.painted = paint(maps[at], top)));
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
