"use strict";
// Maps and keys out of the data, each when it is first needed.
(() => {
  const { page } = window.polyhead;
  let maps = new Map();
  let read = new Map();
  let looks = new Map();

  const inflate = async (text) => {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };

  // { n, codes (n * n), scale, levels }: cell (row, column) is scale * (code / levels) ** 2.
  const readMap = async (data, place) => {
    const n = data.maps.edges.length - 1;
    const codes = await inflate(data.maps.data[place]);
    for (let cell = n; cell < codes.length; cell++) codes[cell] += codes[cell - n]; // modulo 256
    return { n, codes, levels: data.maps.levels, scale: data.maps.scales[place] };
  };

  page.mapOf = (place) => {
    if (!maps.has(place)) {
      const own = read; // of this text: another may be shown before it is inflated
      const map = readMap(window.polyhead.data, place);
      map.then((inflated) => own.set(place, inflated));
      maps.set(place, map);
    }
    return maps.get(place);
  };
  // The same without waiting, once it was inflated; otherwise undefined.
  page.readMap = (place) => read.get(place);

  page.weightAt = (map, row, column) =>
    map.scale * (map.codes[row * map.n + column] / map.levels) ** 2;

  page.pooled = () => window.polyhead.data.maps.edges.length <= window.polyhead.data.tokens.length;

  // { starts, keys, weights }: those of token t lie from starts[t] to before starts[t + 1].
  const readKeys = async (data, place) => {
    const T = data.tokens.length;
    const { levels, bytes } = data.keys;
    const raw = await inflate(data.keys.data[place]);
    const starts = new Int32Array(T + 1);
    for (let t = 0; t < T; t++) starts[t + 1] = starts[t] + raw[t];
    const count = starts[T];
    const keys = new Int32Array(count);
    for (let t = 0; t < T; t++) {
      for (let at = starts[t]; at < starts[t + 1]; at++) {
        let distance = 0;
        for (let byte = 0; byte < bytes; byte++) {
          distance += raw[T + (1 + byte) * count + at] << (8 * byte);
        }
        keys[at] = distance === T ? 0 : (t - distance + T) % T;
      }
    }
    const weights = Float32Array.from(raw.subarray(T, T + count), (code) => (code / levels) ** 2);
    return { starts, keys, weights };
  };

  // The same from a map whose cells are the weights themselves.
  const readCells = async (place) => {
    const { n, codes, scale, levels } = await page.mapOf(place);
    return {
      starts: Int32Array.from({ length: n + 1 }, (_, t) => t * n),
      keys: Int32Array.from(codes, (_, cell) => cell % n),
      weights: Float32Array.from(codes, (code) => scale * (code / levels) ** 2),
    };
  };

  const readLooks = async (data, place) => {
    const none = { starts: new Int32Array(data.tokens.length + 1), keys: [], weights: [] };
    const kept = async () => (data.keys ? await readKeys(data, place) : none);
    const { starts, keys, weights } = await (page.pooled() ? kept() : readCells(place));
    const strongest = (pairs) => pairs.sort((one, two) => two[1] - one[1]);
    return {
      // Pairs [token, weight], the strongest first: where token t looks, and who looks at it.
      to(t) {
        const pairs = [];
        for (let at = starts[t]; at < starts[t + 1]; at++) {
          if (weights[at] > 0) pairs.push([keys[at], weights[at]]);
        }
        return strongest(pairs);
      },
      from(t) {
        const pairs = [];
        let query = 0;
        for (let at = 0; at < keys.length; at++) {
          while (at >= starts[query + 1]) query++;
          if (keys[at] === t && weights[at] > 0) pairs.push([query, weights[at]]);
        }
        return strongest(pairs);
      },
    };
  };

  page.looksOf = (place) => {
    if (!looks.has(place)) {
      if (looks.size >= 8) looks.delete(looks.keys().next().value);
      looks.set(place, readLooks(window.polyhead.data, place));
    }
    return looks.get(place);
  };

  page.on("data", () => {
    maps = new Map();
    read = new Map();
    looks = new Map();
  });
})();
