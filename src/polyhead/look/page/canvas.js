"use strict";
// A map on a canvas: its cells, the chosen token, and tokens on its axes.
(() => {
  const { page } = window.polyhead;

  // The cell, along either axis, that a token lies in.
  page.binOf = (token) => {
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

  // A few hundred tokens can be named; of more, their numbers.
  const named = (view) => view.size <= 400;

  // The whole map as an image of a pixel a cell; `top` is the weight that is brightest.
  page.paintMap = (map, top) => {
    const image = new ImageData(map.n, map.n);
    const ramp = page.ramp();
    const lookup = Array.from({ length: map.levels + 1 }, (_, code) => {
      const weight = map.scale * (code / map.levels) ** 2;
      return 3 * Math.round(255 * page.brightness(Math.min(1, weight / top)));
    });
    for (let cell = 0; cell < map.codes.length; cell++) {
      const color = lookup[map.codes[cell]];
      for (let c = 0; c < 3; c++) image.data[4 * cell + c] = ramp[color + c];
      image.data[4 * cell + 3] = 255;
    }
    const canvas = page.element("canvas", { width: map.n, height: map.n });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  };

  // Bins are not all of one size, so each is drawn where its tokens are, but for the whole map.
  const drawCells = (context, painted, view, { left, above, side, scale }) => {
    const { edges } = window.polyhead.data.maps;
    if (view.whole) return context.drawImage(painted, left, above, side, side);
    const [x0, x1] = [view.first, view.first + view.size - 1e-6].map(page.binOf);
    const [y0, y1] = [view.top, view.top + view.size - 1e-6].map(page.binOf);
    for (let row = y0; row <= y1; row++) {
      const y = above + (edges[row] - view.top) * scale;
      const height = (edges[row + 1] - edges[row]) * scale + 0.5;
      for (let column = x0; column <= x1; column++) {
        const x = left + (edges[column] - view.first) * scale;
        const width = (edges[column + 1] - edges[column]) * scale + 0.5;
        context.drawImage(painted, column, row, 1, 1, x, y, width, height);
      }
    }
  };

  // The row of the chosen token, where it looks, and its column, who looks at it.
  const drawToken = (context, view, { left, above, side, scale }, ink) => {
    const { token, mode, other } = page.state;
    if (token === null) return;
    const width = Math.max(scale, 1) + 1.5;
    context.lineWidth = 1.5;
    if (mode !== "from") {
      context.strokeStyle = other === null ? page.hue(0) : ink;
      context.strokeRect(left - 2, above + (token - view.top) * scale - 0.75, side + 4, width);
    }
    if (mode === "from" || (mode === "both" && other === null)) {
      context.strokeStyle = other === null ? page.hue(1) : ink;
      context.strokeRect(left + (token - view.first) * scale - 0.75, above - 2, width, side + 4);
    }
  };

  const drawNames = (context, view, { left, above, side, scale }) => {
    const name = (token) => (named(view) ? page.quoted(token, 10) : String(token));
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const token of view.ticks(view.top, side / 15)) {
      context.fillText(name(token), left - 6, above + (token + 0.5 - view.top) * scale, left - 8);
    }
    context.textAlign = "left";
    for (const token of view.ticks(view.first, side / 15)) {
      context.save();
      context.translate(left + (token + 0.5 - view.first) * scale, above - 5);
      context.rotate(-Math.PI / 2.6);
      context.fillText(name(token), 0, 0, above + 6);
      context.restore();
    }
  };

  // The part in view, with the names of its tokens, on a canvas as wide as it is laid out.
  page.drawMap = (canvas, painted, view) => {
    const [left, above] = named(view) ? [72, 58] : [40, 34]; // room for names
    const ratio = window.devicePixelRatio || 1;
    const side = canvas.clientWidth - left - 2;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round((side + above + 2) * ratio);
    const context = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    const ink = page.paper ? "#444" : style.color;
    const frame = { left, above, side, scale: side / view.size };
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    context.save();
    context.beginPath();
    context.rect(left, above, side, side);
    context.clip();
    context.imageSmoothingEnabled = false;
    drawCells(context, painted, view, frame);
    drawToken(context, view, frame, ink);
    context.restore();
    context.strokeStyle = style.getPropertyValue("border-top-color");
    context.strokeRect(left - 0.5, above - 0.5, side + 1, side + 1);
    context.fillStyle = ink;
    drawNames(context, view, frame);
    return frame;
  };
})();
