"use strict";
// The arithmetic of both classes, each in its own memory layout, and torch's random numbers.
window.polyhead = {};
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  const unpack = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return Array.from(new Float64Array(bytes.buffer));
  };
  const rows = (flat, columns) =>
    Array.from({ length: flat.length / columns }, (_, r) => flat.slice(r * columns, (r + 1) * columns));

  // torch's generator (Mersenne Twister) and nn.Linear's initialization, to the last bit of float32.
  const generator = (seed) => {
    const m = new Uint32Array(624);
    m[0] = seed;
    for (let i = 1; i < 624; i++) m[i] = Math.imul(1812433253, m[i - 1] ^ (m[i - 1] >>> 30)) + i;
    let at = 624;
    return () => {
      if (at === 624) {
        for (let k = 0; k < 624; k++) {
          const y = (m[k] & 0x80000000) | (m[(k + 1) % 624] & 0x7fffffff);
          m[k] = m[(k + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
        }
        at = 0;
      }
      let y = m[at++];
      y ^= y >>> 11;
      y ^= (y << 7) & 0x9d2c5680;
      y ^= (y << 15) & 0xefc60000;
      return ((y ^ (y >>> 18)) & 0xffffff) / 0x1000000;
    };
  };
  const uniform = (draw, bound, count) => {
    const b = Math.fround(bound);
    return Array.from({ length: count }, () => Math.fround(draw() * Math.fround(2 * b) - b));
  };
  const linear = (draw, inputs, outputs) => {
    const bound = Math.sqrt(3) * (Math.sqrt(2 / (1 + Math.sqrt(5) ** 2)) / Math.sqrt(inputs));
    return rows(uniform(draw, bound, inputs * outputs), inputs);
  };
  const drawOut = (draw, size) => ({
    W_out: linear(draw, size, size),
    bias: uniform(draw, 1 / Math.sqrt(size), size),
  });
  // Stacked heads draw query, key, value of one head after the other.
  const drawStacked = (seed, H, d, inputs) => {
    const draw = generator(seed);
    const w = { W_query: [], W_key: [], W_value: [] };
    for (let h = 0; h < H; h++) for (const name in w) w[name].push(...linear(draw, inputs, d));
    return { ...w, ...drawOut(draw, H * d) };
  };
  // The split class draws all queries, then all keys, then all values.
  const drawSplit = (seed, H, d, inputs) => {
    const draw = generator(seed);
    const w = {};
    for (const name of ["W_query", "W_key", "W_value"]) w[name] = linear(draw, inputs, H * d);
    return { ...w, ...drawOut(draw, H * d) };
  };

  const dot = (a, b) => {
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
    return sum;
  };
  const softmax = (row) => {
    const most = Math.max(...row);
    const exps = row.map((s) => Math.exp(s - most));
    const sum = exps.reduce((a, b) => a + b);
    return exps.map((e) => e / sum);
  };
  const times = (n, f) => Array.from({ length: n }, (_, i) => f(i));

  // Stacked heads: one head after the other, each with weights of its own; then torch.cat.
  const stacked = (s) => {
    const { H, d, T, x, w } = s;
    const found = { query: [], key: [], value: [], scores: [], masked: [], weights: [], contexts: [] };
    for (let h = 0; h < H; h++) {
      const project = (name) => x.map((row) => w[name].slice(h * d, h * d + d).map((r) => dot(row, r)));
      const [q, k, v] = [project("W_query"), project("W_key"), project("W_value")];
      const scores = q.map((a) => k.map((b) => dot(a, b)));
      const masked = scores.map((row, i) =>
        row.map((score, j) => (s.causal && j > i ? -Infinity : edited(s, h, i, j, score / Math.sqrt(d)))),
      );
      const weights = masked.map(softmax);
      const contexts = weights.map((row) => times(d, (e) => dot(row, v.map((r) => r[e])) * kept(s, h)));
      const parts = { query: q, key: k, value: v, scores, masked, weights, contexts };
      for (const name in parts) found[name].push(parts[name]);
    }
    found.merged = times(T, (t) => found.contexts.flatMap((head) => head[t]));
    found.projected = s.out === "both" ? project(found.merged, w) : found.merged;
    return found;
  };
  const edited = (s, h, i, j, value) =>
    s.edit && s.edit.h === h && s.edit.i === i && s.edit.j === j ? s.edit.value : value;
  const kept = (s, h) => (s.silent === h ? 0 : 1);
  const project = (merged, w) => merged.map((row) => w.W_out.map((r, o) => dot(row, r) + w.bias[o]));

  // The split: numbers in one strip, and shapes and strides that say where to find them.
  const tensor = (strip, shape) => {
    const strides = shape.map((_, at) => shape.slice(at + 1).reduce((a, b) => a * b, 1));
    return { strip, shape, strides };
  };
  const at = (t, ...index) => t.strip[index.reduce((sum, i, a) => sum + i * t.strides[a], 0)];
  const view = (t, ...shape) => tensor(t.strip, shape);
  const permute = (t, ...order) => ({
    strip: t.strip,
    shape: order.map((a) => t.shape[a]),
    strides: order.map((a) => t.strides[a]),
  });
  const nested = ({ strip, shape, strides }, offset = 0) =>
    times(shape[0], (i) => {
      const here = offset + i * strides[0];
      if (shape.length === 1) return strip[here];
      return nested({ strip, shape: shape.slice(1), strides: strides.slice(1) }, here);
    });
  const contiguous = (t) => tensor(nested(t).flat(t.shape.length - 1), t.shape);

  const split = (s) => {
    const { H, d, T, x } = s;
    const w = s.unconverted ? drawSplit(s.seed, H, d, x[0].length) : s.w;
    const large = (name) => tensor(x.flatMap((row) => w[name].map((r) => dot(row, r))), [T, H * d]);
    const heads = (t) => (s.noTranspose ? view(t, H, T, d) : permute(view(t, T, H, d), 1, 0, 2));
    const [q, k, v] = ["W_query", "W_key", "W_value"].map(large);
    const [qh, kh, vh] = [q, k, v].map(heads);
    const cells = (f) => times(H, (h) => times(T, (i) => times(T, (j) => f(h, i, j))));
    const scores = cells((h, i, j) => {
      let sum = 0;
      for (let e = 0; e < d; e++) sum += at(qh, h, i, e) * at(kh, h, j, e);
      return sum;
    });
    const scaled = cells((h, i, j) => edited(s, h, i, j, scores[h][i][j] / Math.sqrt(d)));
    const ahead = (i, j) => s.causal && j > i;
    const hide = (from, to) => cells((h, i, j) => (ahead(i, j) ? to : from[h][i][j]));
    const masked = s.maskAfter ? scaled : hide(scaled, -Infinity);
    const soft = masked.map((head) => head.map(softmax));
    const weights = s.maskAfter ? hide(soft, 0) : soft;
    const contexts = tensor(
      times(H, (h) =>
        times(T, (i) =>
          times(d, (e) => {
            let sum = 0;
            for (let j = 0; j < T; j++) sum += weights[h][i][j] * at(vh, h, j, e);
            return sum * kept(s, h);
          }),
        ),
      ).flat(2),
      [H, T, d],
    );
    const back = s.noBack ? contexts : contiguous(permute(contexts, 1, 0, 2));
    const merged = nested(view(back, T, H * d));
    return {
      query: nested(qh), key: nested(kh), value: nested(vh), scores, masked, weights,
      contexts: nested(contexts), merged, w,
      large: { query: q, key: k, value: v }, before: contexts.strip, after: back.strip,
      projected: s.out === "none" ? merged : project(merged, w),
    };
  };

  const apart = (a, b) => {
    const [p, q] = [[a].flat(Infinity), [b].flat(Infinity)];
    return p.reduce((most, v, i) => (v === q[i] ? most : Math.max(most, Math.abs(v - q[i]))), 0);
  };

  Object.assign(window.polyhead, {
    data, unpack, rows, generator, drawStacked, drawSplit, dot, softmax, times, stacked, split,
    project, tensor, view, permute, nested, apart,
  });
})();
