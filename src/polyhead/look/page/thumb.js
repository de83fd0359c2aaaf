"use strict";
// A head's map in a few pixels: the strongest cell of each square, so that thin lines stay.
(() => {
  const { page } = window.polyhead;
  const MOST = 64;

  const paint = (canvas, map) => {
    const step = Math.max(1, Math.round(map.n / MOST));
    const side = Math.ceil(map.n / step);
    const image = new ImageData(side, side);
    const ramp = page.ramp();
    for (let row = 0; row < map.n; row++) {
      for (let column = 0; column < map.n; column++) {
        const code = map.codes[row * map.n + column];
        if (code === 0) continue;
        const at = 4 * (Math.floor(row / step) * side + Math.floor(column / step));
        image.data[at + 3] = Math.max(image.data[at + 3], (255 * code) / map.levels);
      }
    }
    for (let at = 0; at < image.data.length; at += 4) {
      const share = (image.data[at + 3] / 255) ** 2;
      const color = 3 * Math.round(255 * page.brightness(share));
      for (let c = 0; c < 3; c++) image.data[at + c] = ramp[color + c];
      image.data[at + 3] = 255;
    }
    canvas.width = side;
    canvas.height = side;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.style.imageRendering = side < 32 ? "pixelated" : "auto"; // few tokens are squares
    canvas.dataset.drawn = "";
  };

  // Drawn when they come near the window, the others when there is time, as they may be printed;
  // and again when colors change.
  let observer = null;
  let waiting = new Set();
  const later =
    window.requestIdleCallback ??
    ((work) =>
      setTimeout(() => {
        const until = performance.now() + 10;
        work({ timeRemaining: () => until - performance.now() });
      }, 50));
  const place = (canvas) => Number(canvas.dataset.place);
  const take = (canvas) => {
    observer.unobserve(canvas);
    waiting.delete(canvas);
  };
  const draw = async (canvas) => {
    take(canvas);
    const own = waiting;
    const map = await page.mapOf(place(canvas));
    if (own === waiting) paint(canvas, map);
  };
  const drawRead = (canvases, enough = () => false) => {
    for (const canvas of canvases) {
      const map = page.readMap(place(canvas));
      if (map) {
        take(canvas);
        paint(canvas, map);
      }
      if (enough()) return;
    }
  };
  const drawSome = (canvases) =>
    later((deadline) => {
      if (canvases !== waiting) return; // the tiles are others now
      drawRead(canvases, () => deadline.timeRemaining() < 4);
      if (canvases.size) drawSome(canvases);
    });
  page.thumbs = (canvases) => {
    observer?.disconnect();
    waiting = new Set(canvases);
    for (const canvas of canvases) delete canvas.dataset.drawn;
    observer = new IntersectionObserver(
      (entries) => {
        for (const { isIntersecting, target } of entries) if (isIntersecting) draw(target);
      },
      { rootMargin: "300px" },
    );
    for (const canvas of canvases) observer.observe(canvas);
    const own = waiting;
    later(() => {
      for (const canvas of own) page.mapOf(place(canvas)); // inflated beside one another
      drawSome(own);
    });
  };

  // Draw now what can be drawn without waiting; returns how many are left.
  page.drawRead = () => {
    const left = new Set(document.querySelectorAll(".tile canvas:not([data-drawn])"));
    drawRead(left);
    return document.querySelectorAll(".tile canvas:not([data-drawn])").length;
  };
})();
