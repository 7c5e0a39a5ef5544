"use strict";
// The page's behaviour: tabs, theme, pictures and charts. Everything shown comes from the JSON block, by name.
(() => {
  const ROWS_IN_A_TABLE = 500;
  const HITS_LISTED = 24;
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("report-data").textContent);
  const root = document.documentElement;
  const views = new Map(); // element of a plot -> {view, theme}

  // --- theme: the system's, until the button says otherwise
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let onPaper = false;
  const theme = () => (onPaper ? "light" : root.dataset.theme || (dark.matches ? "dark" : "light"));
  const remembered = (value) => {
    try { // a page from a file, or in a sandbox, may have no storage
      if (value === undefined) return localStorage.getItem("teacher-cache-theme");
      localStorage.setItem("teacher-cache-theme", value);
    } catch { /* the choice lasts as long as the page */ }
    return null;
  };
  const sayTheme = () => { $("theme-word").textContent = theme() === "dark" ? "Light" : "Dark"; };
  const startTheme = () => {
    const before = remembered();
    if (before === "light" || before === "dark") root.dataset.theme = before;
    $("theme").hidden = false;
    $("theme").addEventListener("click", () => {
      root.dataset.theme = theme() === "dark" ? "light" : "dark";
      remembered(root.dataset.theme);
      sayTheme();
      drawShown();
    });
    dark.addEventListener("change", () => { sayTheme(); drawShown(); });
    sayTheme();
  };

  // --- pictures: each is in the block once, and handed out by row
  const startPictures = () => {
    for (const image of document.querySelectorAll("img[data-picture]")) {
      image.src = data.pictures[image.dataset.picture];
    }
  };

  // --- tabs, after the ARIA Authoring Practices: one stop of the Tab key, arrows, Home and End
  const tabs = [...$("tabs").querySelectorAll("a")];
  const panelOf = (tab) => $(tab.hash.slice(1));
  const select = (tab, focus) => {
    for (const each of tabs) {
      const on = each === tab;
      each.setAttribute("aria-selected", String(on));
      each.tabIndex = on ? 0 : -1;
      panelOf(each).hidden = !on;
    }
    if (focus) tab.focus();
    // scrolls the row of tabs, never the page
    $("tabs").scrollLeft = tab.offsetLeft - ($("tabs").clientWidth - tab.offsetWidth) / 2;
    hideThumb();
    drawShown();
  };
  const remember = (tab) => {
    try { history.replaceState(null, "", tab.hash); } catch { /* in a sandbox the address stays */ }
  };
  const startTabs = () => {
    $("tabs").setAttribute("role", "tablist");
    $("tabs").setAttribute("aria-label", "Parts of the report");
    for (const tab of tabs) {
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", panelOf(tab).id);
      panelOf(tab).setAttribute("role", "tabpanel");
      panelOf(tab).setAttribute("aria-labelledby", tab.id);
      tab.addEventListener("click", (event) => { event.preventDefault(); select(tab, true); remember(tab); });
    }
    $("tabs").addEventListener("keydown", (event) => {
      const at = tabs.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1, " ": at }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      const tab = tabs[(to + tabs.length) % tabs.length];
      select(tab, true);
      remember(tab);
    });
    const byHash = () => tabs.find((tab) => tab.hash === location.hash);
    addEventListener("hashchange", () => { if (byHash()) select(byHash(), false); });
    select(byHash() || tabs[0], false);
  };

  // --- charts: drawn when first seen, and again in another theme
  const records = (chart) => {
    // kept: tables, map and both themes read the same objects
    chart.records ??= chart.rows.map((row) => Object.fromEntries(chart.fields.map((field, at) => [field, row[at]])));
    return chart.records;
  };
  const draw = async (element) => {
    const now = theme();
    const before = views.get(element);
    if (before?.theme === now) return;
    views.set(element, { theme: now });
    before?.result?.finalize();
    const name = element.dataset.chart;
    const chart = data.charts[name];
    const spec = structuredClone(chart.spec);
    if (name === "losses" && $("loss-log").checked) spec.encoding.y.scale = { type: "log" };
    const config = data.themes[now];
    // a finger that drags the map would no longer scroll the page
    if (name === "map" && matchMedia("(pointer: coarse)").matches) spec.params = spec.params.filter((param) => !param.select);
    const result = await vegaEmbed(element, { ...spec, datasets: { [name]: records(chart) } }, {
      actions: false,
      ast: true, // the interpreter: the page's policy forbids to compile code
      config: { ...config, legend: { ...config.legend, columns: Math.max(1, Math.floor(element.clientWidth / 260)) } },
      renderer: chart.canvas ? "canvas" : "svg",
      tooltip: { theme: now === "dark" ? "dark" : "light" },
    });
    if (views.get(element)?.theme !== now) { result.finalize(); return; } // changed meanwhile
    views.set(element, { theme: now, result });
    if (name === "map") startMap(element, result.view);
    if (name === "losses") applyLoss(result.view);
  };
  const drawShown = () => {
    if (!window.vegaEmbed) return; // the libraries come after this script
    for (const element of document.querySelectorAll(".plot")) {
      if (element.closest("section")?.hidden) continue;
      if (views.get(element)?.theme === theme()) continue;
      draw(element);
    }
    dispatchEvent(new Event("resize")); // what was hidden while the window changed has its old width
  };
  const redraw = (name) => {
    for (const element of document.querySelectorAll(`.plot[data-chart="${name}"]`)) {
      const before = views.get(element);
      if (!before) continue;
      views.set(element, { theme: null, result: before.result });
      draw(element);
    }
  };

  // --- the rows of a chart as a table, made when asked for
  const startTables = () => {
    for (const details of document.querySelectorAll("details[data-table]")) {
      details.addEventListener("toggle", () => {
        if (details.open && details.children.length === 1) details.append(...tableOf(data.charts[details.dataset.table]));
      });
    }
  };
  const said = (value) => {
    if (value === null) return "–";
    if (typeof value !== "number" || Number.isInteger(value)) return String(value);
    return String(Number(value.toPrecision(5)));
  };
  const tableOf = (chart) => {
    const made = [];
    const shown = chart.rows.slice(0, ROWS_IN_A_TABLE);
    if (shown.length < chart.rows.length) {
      const note = document.createElement("p");
      note.className = "small";
      note.textContent = `The first ${shown.length.toLocaleString("en")} of ${chart.rows.length.toLocaleString("en")} rows.`;
      made.push(note);
    }
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", `${chart.alt}, as a table`);
    const table = scroll.appendChild(document.createElement("table"));
    const head = table.createTHead().insertRow();
    for (const heading of chart.headings) {
      const cell = head.appendChild(document.createElement("th"));
      cell.scope = "col";
      cell.textContent = heading;
    }
    const body = table.createTBody();
    for (const row of shown) {
      const line = body.insertRow();
      for (const value of row) {
        const cell = line.appendChild(document.createElement(line.cells.length ? "td" : "th"));
        cell.textContent = said(value);
        if (cell.tagName === "TH") cell.scope = "row";
        if (typeof value === "string") { cell.classList.add("words"); cell.dir = "auto"; }
      }
    }
    made.push(scroll);
    return made;
  };

  // --- the picture and caption beside a point
  const thumb = $("thumb");
  const hideThumb = () => { thumb.hidden = true; };
  const showThumb = (point, x, y) => {
    const image = thumb.querySelector("img");
    const source = data.pictures[point.picture];
    image.hidden = !source;
    if (source && image.dataset.row !== String(point.picture)) {
      image.src = source;
      image.dataset.row = String(point.picture);
    }
    image.alt = point.label;
    thumb.querySelector("p").textContent = `${point.label} (${point.tower} ${point.row}, ${point.split})`;
    thumb.hidden = false;
    const box = thumb.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
    const top = y + 16 + box.height > innerHeight ? y - 16 - box.height : y + 16;
    thumb.style.left = `${Math.max(4, left)}px`;
    thumb.style.top = `${Math.max(4, top)}px`;
  };

  // --- the map: pointer, touch and keys lead to the same points
  const map = { view: null, element: null, chosen: null };
  const wanted = () => ({
    query: $("map-query").value.trim().toLowerCase(), split: $("map-split").value, tower: $("map-tower").value,
  });
  const shownPoints = () => {
    const { split, tower } = wanted();
    return records(data.charts.map).filter((p) => (!split || p.split === split) && (!tower || p.tower === tower));
  };
  const placeIn = () => {
    const box = map.element.querySelector("canvas").getBoundingClientRect();
    const [left, top] = map.view.origin();
    const [x, y] = [map.view.scale("x"), map.view.scale("y")];
    return (point) => [box.left + left + x(point.x), box.top + top + y(point.y)];
  };
  const pointAt = (event) => {
    // the nearest within reach: a dot is too small for a finger
    let least = event.pointerType === "touch" ? 24 : 9;
    let found = null;
    const placeOf = placeIn();
    for (const point of shownPoints()) {
      const [x, y] = placeOf(point);
      const away = Math.hypot(x - event.clientX, y - event.clientY);
      if (away < least) { least = away; found = point; }
    }
    return found;
  };
  // a ring around the point, and a line to the other half of its pair
  const mark = (point) => {
    map.view.signal("chosen", point ? point.index : -1).signal("linked", point ? point.picture : -1).runAsync();
  };
  const choose = (point) => {
    map.chosen = point;
    mark(point);
    if (point) showThumb(point, ...placeIn()(point)); else hideThumb();
  };
  const applyMap = () => {
    const { query, split, tower } = wanted();
    map.view.signal("query", query).signal("split", split).signal("tower", tower);
    map.view.runAsync();
    const hits = query ? shownPoints().filter((p) => p.label.toLowerCase().includes(query)) : [];
    $("map-said").textContent = query
      ? `${hits.length.toLocaleString("en")} of ${shownPoints().length.toLocaleString("en")} points contain it` +
        (hits.length > HITS_LISTED ? `; the first ${HITS_LISTED}:` : hits.length ? ":" : ".")
      : "";
    $("map-hits").replaceChildren(...hits.slice(0, HITS_LISTED).map((point) => {
      const item = document.createElement("li");
      const button = item.appendChild(document.createElement("button"));
      button.type = "button";
      button.dir = "auto";
      button.textContent = point.label;
      for (const kind of ["focus", "click", "mouseenter"]) button.addEventListener(kind, () => choose(point));
      for (const kind of ["blur", "mouseleave"]) button.addEventListener(kind, () => choose(null));
      return item;
    }));
  };
  const nearest = (key) => {
    const points = shownPoints();
    if (!map.chosen || !points.includes(map.chosen)) return points[0];
    const [dx, dy] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[key];
    let best = null;
    let least = Infinity;
    for (const point of points) {
      const x = point.x - map.chosen.x;
      const y = point.y - map.chosen.y;
      const along = x * dx + y * dy;
      const across = Math.abs(x * dy) + Math.abs(y * dx);
      // straight ahead counts more than near: else one would walk in circles
      if (along > 0 && along + 2 * across < least) { least = along + 2 * across; best = point; }
    }
    return best || map.chosen;
  };
  const startMap = (element, view) => {
    Object.assign(map, { view, element });
    applyMap();
    if (element.tabIndex === 0) return; // drawn before, in another theme
    const pointed = (event) => {
      const point = event.type === "pointermove" && event.buttons ? null : pointAt(event); // not while it is dragged
      mark(point);
      if (point) showThumb(point, event.clientX, event.clientY); else hideThumb();
    };
    for (const kind of ["pointermove", "pointerdown"]) element.addEventListener(kind, pointed);
    // a finger that was lifted has not gone elsewhere
    element.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") { mark(null); hideThumb(); } });
    element.tabIndex = 0;
    element.setAttribute("role", "application");
    element.setAttribute("aria-describedby", "map-help");
    element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") choose(null);
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      choose(nearest(event.key) ?? null);
      if (map.chosen) $("map-said").textContent = thumb.querySelector("p").textContent;
    });
    element.addEventListener("blur", () => choose(null));
    $("map-controls").hidden = false;
    $("map-controls").addEventListener("submit", (event) => event.preventDefault());
    for (const id of ["map-query", "map-split", "map-tower"]) $(id).addEventListener("input", applyMap);
    $("map-reset").addEventListener("click", () => { $("map-controls").reset(); map.chosen = null; redraw("map"); });
  };
  addEventListener("scroll", hideThumb, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideThumb(); });

  // --- losses: which one, and how its axis runs
  const applyLoss = (view) => {
    view.signal("part", $("loss-part").value).signal("above0", $("loss-log").checked).runAsync();
  };
  const startLosses = () => {
    if (!$("loss-controls")) return;
    $("loss-controls").hidden = false;
    for (const id of ["loss-part", "loss-log"]) $(id).addEventListener("input", () => redraw("losses"));
  };

  const start = () => {
    startTheme();
    startPictures();
    startTables();
    startLosses();
    startTabs();
  };
  start();
  document.addEventListener("DOMContentLoaded", drawShown);
  addEventListener("beforeprint", () => {
    onPaper = true;
    for (const panel of tabs.map(panelOf)) panel.hidden = false;
    drawShown();
  });
  addEventListener("afterprint", () => {
    onPaper = false;
    select(tabs.find((tab) => tab.tabIndex === 0), false);
  });
})();
