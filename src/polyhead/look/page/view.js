"use strict";
// The part of a map that is seen: a square of tokens, zoomed and moved.
(() => {
  const { page } = window.polyhead;

  // Keys first .. first + size along, queries top .. top + size down; in tokens, not whole ones.
  page.View = class {
    constructor(tokens) {
      this.tokens = tokens;
      this.reset();
    }

    reset() {
      this.first = 0;
      this.top = 0;
      this.size = this.tokens;
    }

    get whole() {
      return this.size >= this.tokens;
    }

    // Zoom by a factor, keeping what lies at (x, y), parts of the side, where it is.
    zoom(factor, x = 0.5, y = 0.5) {
      const size = Math.min(this.tokens, Math.max(Math.min(6, this.tokens), this.size / factor));
      this.first += x * (this.size - size);
      this.top += y * (this.size - size);
      this.size = size;
      this.move(0, 0);
    }

    // By parts of the side.
    move(right, down) {
      const inside = (value) => Math.min(Math.max(value, 0), this.tokens - this.size);
      this.first = inside(this.first + right * this.size);
      this.top = inside(this.top + down * this.size);
    }

    // The token at a part of the side, of those from `start` on.
    at(start, part) {
      return Math.min(this.tokens - 1, Math.max(0, Math.floor(start + part * this.size)));
    }

    // Tokens to be named when there is room for `most` names; [] of a text of none.
    ticks(start, most) {
      const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000];
      const step = steps.find((s) => this.size / s <= most) ?? steps.at(-1);
      const found = [];
      for (let token = Math.ceil(start / step) * step; token < start + this.size; token += step) {
        if (token + 0.5 <= start + this.size && token < this.tokens) found.push(token);
      }
      return found;
    }
  };
})();
