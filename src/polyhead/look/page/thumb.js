"use strict";
// A head's map in a few pixels: the strongest cell of each square, so that thin lines stay.
(() => {
  const { page } = window.polyhead;
  const MOST = 64;

  const draw = async (canvas, place) => {
    const map = await page.mapOf(place);
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
  const later = window.requestIdleCallback ?? ((work) => setTimeout(work, 50));
  const drawNext = (canvases) => {
    const [canvas] = canvases;
    if (!canvas || canvases !== waiting) return;
    canvases.delete(canvas);
    observer.unobserve(canvas);
    draw(canvas, Number(canvas.dataset.place)).then(() => later(() => drawNext(canvases)));
  };
  page.thumbs = (canvases) => {
    observer?.disconnect();
    waiting = new Set(canvases);
    observer = new IntersectionObserver(
      (entries) => {
        for (const { isIntersecting, target } of entries) {
          if (!isIntersecting) continue;
          observer.unobserve(target);
          waiting.delete(target);
          draw(target, Number(target.dataset.place));
        }
      },
      { rootMargin: "300px" },
    );
    for (const canvas of canvases) observer.observe(canvas);
    const own = waiting;
    later(() => drawNext(own));
  };
})();
