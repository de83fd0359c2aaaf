"use strict";
// While a server answers: other texts, heads switched off, and what that does to the next token.
(() => {
  const { page } = window.polyhead;
  const { element, byId } = page;
  const GONE = "Switched off. ";
  const off = new Map(); // name -> [layer, head]
  let read = ""; // the text that the page shows
  let wanted = ""; // the text that it shall show
  let busy = false;
  let again = false; // something changed while the server was busy

  const area = element("textarea", { id: "live-text", rows: 7, spellcheck: false });
  const button = element("button", { type: "button", className: "primary" }, "Read");
  const limit = element("span", { className: "note" });
  const status = element("p", { id: "live-status", className: "note", role: "status" });
  const rows = element("tbody");
  const without = element("th", { scope: "col", className: "after" });
  const table = element(
    "table",
    { id: "next", className: "next" },
    element("caption", { className: "unseen" }, "The most probable next tokens"),
    element("thead", {}, element("tr", {},
      element("th", { scope: "col" }, "next token"),
      element("th", { scope: "col", className: "before" }, "all heads on"),
      without,
      element("th", { scope: "col", className: "change" }, "change"),
    )),
    rows,
  );
  const toggle = element("button", { type: "button", id: "toggle" });
  const kinds = element("select", { id: "off-kind", "aria-label": "Switch off all heads of a kind" });
  const how = element("select", { id: "how" },
    element("option", { value: "zero" }, "nothing"),
    element("option", { value: "mean" }, "its mean over the text"),
  );
  const chips = element("ul", { id: "off", className: "chips", "aria-label": "Heads switched off" });
  byId("live").append(
    element("div", { className: "live-text" },
      element("h2", {}, element("label", { htmlFor: "live-text" }, "The text it reads")),
      area,
      element("div", { className: "bar" }, button, limit),
      status,
    ),
    element("div", { className: "live-next" },
      element("h2", {}, "What comes next"),
      table,
      element("div", { className: "bar" }, kinds, element("label", {}, "a head that is off adds ", how)),
      chips,
    ),
  );
  byId("compare").before(toggle);
  const peek = element("aside", { id: "peek", hidden: true, "aria-hidden": "true" });
  byId("live").after(peek);

  const nameOf = (head) => head.join(".");
  const chosen = () => window.polyhead.data.heads[page.state.head];

  // What is switched off, wherever the page shows it.
  const mark = () => {
    const { data } = window.polyhead;
    for (const tile of byId("grid").querySelectorAll(".tile")) {
      const gone = off.has(nameOf(data.heads[tile.dataset.place]));
      tile.classList.toggle("off", gone);
      const label = tile.getAttribute("aria-label").replace(GONE, "");
      tile.setAttribute("aria-label", gone ? GONE + label : label);
      tile.title = tile.getAttribute("aria-label");
    }
    const name = nameOf(chosen());
    toggle.textContent = off.has(name) ? "Switch on again" : "Switch off";
    toggle.setAttribute("aria-label", `${toggle.textContent}: head ${name}`);
    toggle.setAttribute("aria-pressed", String(off.has(name)));
    const counts = new Map();
    data.heads.forEach((head, place) => {
      const kind = data.kinds[place];
      if (!off.has(nameOf(head))) counts.set(kind, (counts.get(kind) ?? 0) + 1);
    });
    kinds.replaceChildren(
      element("option", { value: "" }, "Switch off all …"),
      ...[...counts].map(([kind, n]) => element("option", { value: kind }, `${kind} heads (${n})`)),
    );
    const items = [...off.keys()].map((head) => {
      const remove = element("button", { type: "button", title: "Switch it on again" },
        head, element("span", { className: "unseen" }, " is off: switch it on again"), element("span", { "aria-hidden": "true" }, " ×"));
      remove.dataset.head = head;
      return element("li", {}, remove);
    });
    if (off.size > 1) items.push(element("li", {}, element("button", { type: "button", id: "all-on", className: "quiet" }, "All on again")));
    if (!off.size) items.push(element("li", { className: "note" }, "No head is switched off. Choose one below and switch it off, or press x on it."));
    chips.replaceChildren(...items);
    const names = [...off.keys()];
    const shown = names.length > 3 ? `${names.length} heads` : names.join(", ");
    without.textContent = off.size ? `without ${shown}` : "with heads off";
  };

  const tokenOf = (text) => page.visible(text).replaceAll(" ", "␣");

  const bar = (probability, most, className) => {
    const line = element("span", { className: "line", "aria-hidden": "true" });
    line.style.width = `${(100 * probability) / most}%`;
    return element("td", { className }, element("span", { className: "track" }, line), element("span", { className: "value" }, page.share(probability)));
  };

  const showNext = (next) => {
    const most = Math.max(...next.flatMap(({ before, after }) => [before, after]));
    rows.replaceChildren(
      ...next.map(({ text, before, after }) => {
        const token = element("th", { scope: "row" }, element("bdi", {}, tokenOf(text)));
        if (!off.size) return element("tr", {}, token, bar(before, most, "before"), element("td", { className: "after" }), element("td", { className: "change" }));
        const points = 100 * (after - before);
        const change = Math.abs(points) < 0.05 ? "0" : `${points > 0 ? "+" : "−"}${Math.abs(points).toFixed(1)}`;
        return element("tr", {}, token, bar(before, most, "before"), bar(after, most, "after"),
          element("td", { className: `change ${points > 0 ? "more" : "less"}` }, change));
      }),
    );
    // The same in a line, for when the table is scrolled away.
    const few = next.slice(0, 4).map(({ text, before, after }) => {
      const odds = off.size ? `${page.share(before)} → ${page.share(after)}` : page.share(before);
      return element("span", {}, element("b", {}, element("bdi", {}, tokenOf(text))), ` ${odds}`);
    });
    peek.replaceChildren(element("span", { className: "note" }, off.size ? `Next, ${without.textContent}:` : "Next:"), ...few);
  };

  const say = (words, wrong = false) => {
    status.textContent = words;
    status.classList.toggle("wrong", wrong);
  };

  const waitedFor = async (promise) => {
    const start = performance.now();
    const tell = () => say(`Reading … ${Math.round((performance.now() - start) / 1000)} s`);
    tell();
    const timer = setInterval(tell, 1000);
    try {
      return await promise;
    } finally {
      clearInterval(timer);
    }
  };

  const askOnce = async () => {
    const asked = { text: wanted, off: [...off.values()], how: how.value };
    const answer = await waitedFor(
      fetch("api/read", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(asked),
      }),
    );
    const told = await answer.json();
    if (answer.status === 503) {
      say(`Waiting: ${told.error}`);
      await new Promise((resolve) => setTimeout(resolve, 1000));
      again = true;
    } else if (!answer.ok) {
      wanted = read;
      say(told.error, true);
    } else if (!again) {
      const other = asked.text !== read;
      read = asked.text;
      window.polyhead.show(told.payload);
      if (other) page.choose({ token: null });
      showNext(told.next);
      say(`Read ${told.payload.tokens.length} tokens.`);
    }
  };

  // One question at a time; what changes meanwhile is asked afterwards, once.
  const ask = async () => {
    again = busy;
    if (busy) return;
    busy = true;
    byId("live").setAttribute("aria-busy", "true");
    try {
      do {
        again = false;
        await askOnce();
      } while (again);
    } catch {
      wanted = read;
      say("The server does not answer. Is it still running?", true);
    } finally {
      busy = false;
      byId("live").removeAttribute("aria-busy");
    }
  };

  const change = () => {
    mark();
    ask();
  };
  const flip = (place) => {
    const head = window.polyhead.data.heads[place];
    if (!off.delete(nameOf(head))) off.set(nameOf(head), head);
    change();
  };

  button.addEventListener("click", () => {
    wanted = area.value;
    ask();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) button.click();
  });
  toggle.addEventListener("click", () => flip(page.state.head));
  how.addEventListener("change", () => {
    if (off.size) ask();
  });
  kinds.addEventListener("change", () => {
    const { data } = window.polyhead;
    data.heads.forEach((head, place) => {
      if (data.kinds[place] === kinds.value) off.set(nameOf(head), head);
    });
    change();
  });
  chips.addEventListener("click", ({ target }) => {
    if (target.id === "all-on") off.clear();
    else if (target.dataset.head) off.delete(target.dataset.head);
    else return;
    change();
    (chips.querySelector("button") ?? toggle).focus();
  });
  byId("grid").addEventListener("keydown", (event) => {
    const tile = event.target.closest(".tile");
    if (tile && event.key === "x" && !event.ctrlKey && !event.metaKey && !event.altKey) flip(Number(tile.dataset.place));
  });
  new IntersectionObserver(([{ isIntersecting }]) => {
    peek.hidden = isIntersecting;
  }).observe(table);
  for (const event of ["data", "order", "theme", "select", "present"]) page.on(event, mark);

  const start = async () => {
    const first = await (await fetch("api/start")).json();
    read = wanted = area.value = first.text;
    limit.textContent = `at most ${first.most} tokens; Ctrl+Enter reads`;
    showNext(first.next);
    mark();
    byId("live").hidden = false;
  };
  start();
})();
