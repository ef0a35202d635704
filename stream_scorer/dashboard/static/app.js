// The page: follows `events` (server-sent, see snapshot.py for every name) and shows the newest snapshot.
import { NONE, brief, clock, count, fixed, known, rate, share, short, span } from "./format.js";
import { History } from "./history.js";
import { makeCharts } from "./panels.js";
import { setUpTips } from "./tips.js";

const STALLED_AFTER_MS = 6000;
const RETRY_MS = 3000;
const MAX_EVENTS = 40;
const MAX_VERSIONS = 12;

const history = new History();
const charts = makeCharts();
let snapshot = null;
let heardAt = 0;
let ended = false;
let frame = 0;

// ---- state of the connection
const STATES = {
  connecting: ["connecting", ""],
  live: ["live", ""],
  stalled: ["no news", "The server is there but has sent nothing for a while."],
  lost: ["connection lost", "Connection lost. The numbers below are the last ones received; trying again\u2026"],
  ended: ["run ended", "The run has ended. These are its final numbers."],
};

function setState(name) {
  const [word, banner] = STATES[name];
  document.body.dataset.state = name;
  bind("state", word);
  for (const node of bound("banner")) {
    node.hidden = banner === "";
    if (node.textContent !== banner) node.textContent = banner;
  }
}

function connect() {
  const source = new EventSource("events");
  source.addEventListener("snapshot", (event) => receive(JSON.parse(event.data)));
  source.addEventListener("end", () => {
    ended = true;
    source.close();
    setState("ended");
  });
  source.onerror = () => {
    if (ended) return;
    setState(snapshot ? "lost" : "connecting");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, RETRY_MS);
  };
}

function receive(next) {
  if (snapshot && next.uptime_s < snapshot.uptime_s && next.t_ms > snapshot.t_ms) history.clear(); // a new run
  else if (snapshot && next.t_ms <= snapshot.t_ms) return; // replayed after a reconnect
  snapshot = next;
  heardAt = Date.now();
  history.add(next);
  setState("live");
  if (!frame) frame = requestAnimationFrame(render);
}

setInterval(() => {
  if (document.body.dataset.state === "live" && Date.now() - heardAt > STALLED_AFTER_MS) setState("stalled");
}, 1000);

// ---- drawing
const cache = new Map();
function bound(name) {
  if (!cache.has(name)) cache.set(name, [...document.querySelectorAll(`[data-bind="${name}"]`)]);
  return cache.get(name);
}
function bind(name, text) {
  for (const node of bound(name)) if (node.textContent !== text) node.textContent = text;
}

function render() {
  frame = 0;
  const s = snapshot;
  bind("profile", s.profile);
  bind("uptime", span(s.uptime_s));
  bind("updated", clock(s.t_ms));
  renderLoop(s);
  renderTiles(s);
  renderVersions(s);
  renderEvents(s.events);
  const markers = s.versions.filter((v) => known(v.swapped_ms)).map((v) => ({ t: v.swapped_ms / 1000, version: v.version }));
  markers.sort((a, b) => a.t - b.t);
  for (const chart of charts) chart.update(history.columns, markers);
}

function renderLoop({ scorer, trainer, versions }) {
  const examples = trainer?.examples;
  const total = examples ? examples.first + examples.late_conversion + examples.matured : undefined;
  const rates = { requests: history.rate("requests"), scored: history.rate("scored"), feedback: history.rate("feedback") };
  for (const [name, value] of Object.entries(rates)) bind(`rate.${name}`, rate(value));
  bind("rate.candidates", short(scorer?.candidates_per_s));
  for (const kind of ["impression", "click", "conversion"]) {
    bind(`feedback.${kind}`, count(trainer?.feedback?.[kind]));
    bind(`feedback.${kind}.short`, short(trainer?.feedback?.[kind]));
  }
  bind("examples.late", count(examples?.late_conversion));
  bind("examples.total", count(total));
  bind("holds", count(trainer?.gate_holds));
  const swaps = versions.filter((v) => known(v.swapped_ms)).length;
  bind("swapped", swaps ? `${swaps} so far` : "none yet");
  const flowing = {
    requests: rates.requests > 0, scores: rates.scored > 0, served: rates.scored > 0 && trainer !== null,
    feedback: rates.feedback > 0, versions: versions.length > 0, swap: swaps > 0,
  };
  for (const edge of document.querySelectorAll("[data-flow]")) edge.classList.toggle("on", Boolean(flowing[edge.dataset.flow]));
}

function renderTiles({ t_ms, scorer, trainer, versions, promises }) {
  bind("requests", count(scorer?.requests));
  bind("requests.sub", known(scorer?.lag) ? `${count(scorer.lag)} waiting` : " ");
  bind("scored", count(scorer?.scored));
  bind("scored.sub", scorer ? `${count(scorer.rejected)} rejected` : " ");
  promise("lost", promises?.lost, "none may be");
  promise("duplicates", promises?.duplicates, "only after a crash");
  bind("batch.sub", known(scorer?.batch_rows) ? `${short(scorer.batch_rows)} rows a batch` : " ");
  const latency = scorer?.latency_ms;
  bind("latency", latency ? `${brief(latency.p50)} / ${brief(latency.p99)}` : NONE);
  bind("latency.sub", latency ? "ms" : " ");
  bind("live", known(scorer?.model_version) ? `v${scorer.model_version}` : NONE);
  const live = versions.find((v) => v.version === scorer?.model_version);
  const published = trainer ? `${count(trainer.versions_published)} published` : " ";
  bind("live.sub", known(live?.swapped_ms) ? `in service for ${span((t_ms - live.swapped_ms) / 1000)}` : published);
  bind("missing", share(scorer?.missing_share));
  bind("missing.sub", known(scorer?.degraded_share) ? `${share(scorer.degraded_share)} degraded` : " ");
}

function promise(name, value, kept) {
  bind(name, count(value));
  bind(`${name}.sub`, value === 0 ? "promise kept" : kept);
  const tile = document.querySelector(`[data-tile="${name}"]`);
  tile.classList.toggle("good", value === 0);
  tile.classList.toggle("bad", name === "lost" && value > 0);
  tile.classList.toggle("warn", name === "duplicates" && value > 0);
}

function renderVersions({ t_ms, versions }) {
  const rows = [...versions].sort((a, b) => b.version - a.version).slice(0, MAX_VERSIONS);
  document.getElementById("versions-empty").hidden = rows.length > 0;
  document.getElementById("versions").replaceChildren(
    ...rows.map((v) => {
      const row = cells("tr", [`v${v.version}`, badge(v.state), clock(v.published_ms), swapped(v, t_ms), fixed(4)(v.logloss)], "td");
      row.lastChild.className = "num";
      row.children[2].className = "wide-only";
      row.className = v.state;
      return row;
    }),
  );
}

const swapped = (v, now) => (known(v.swapped_ms) ? `${span((now - v.swapped_ms) / 1000)} ago` : NONE);

function renderEvents(events) {
  document.getElementById("events-empty").hidden = events.length > 0;
  const rows = events.slice(-MAX_EVENTS).reverse();
  document.getElementById("events").replaceChildren(
    ...rows.map((e) => {
      const time = Object.assign(document.createElement("time"), { textContent: clock(e.t_ms) });
      return cells("li", [time, badge(e.kind), e.text], "span");
    }),
  );
}

function badge(word) {
  return Object.assign(document.createElement("span"), { className: `badge ${word}`, textContent: word });
}

function cells(tag, contents, cellTag) {
  const row = document.createElement(tag);
  for (const content of contents) {
    const cell = document.createElement(cellTag);
    cell.append(content);
    row.append(cell);
  }
  return row;
}

setUpTips();
connect();
