// Snapshots become columns for the charts. Memory is bounded: past the limit every other old point goes.
import { known } from "./format.js";

const LIMIT = 1800;
const RATE_WINDOW_MS = 5000;

const READ = {
  candidates: (s) => s.scorer?.candidates_per_s,
  p50: (s) => s.scorer?.latency_ms?.p50,
  p99: (s) => s.scorer?.latency_ms?.p99,
  ctrLogloss: (s) => s.trainer?.ctr?.logloss,
  ctcvrLogloss: (s) => s.trainer?.ctcvr?.logloss,
  ctrPcoc: (s) => s.trainer?.ctr?.pcoc,
  ctcvrPcoc: (s) => s.trainer?.ctcvr?.pcoc,
  ctrAuc: (s) => s.trainer?.ctr?.auc,
  ctcvrAuc: (s) => s.trainer?.ctcvr?.auc,
  truthAuc: (s) => s.truth?.auc_ctr,
};

const feedbackTotal = (s) => {
  const f = s.trainer?.feedback;
  return f ? f.impression + f.click + f.conversion : undefined;
};
const TOTALS = {
  requests: (s) => s.scorer?.requests,
  scored: (s) => s.scorer?.scored,
  feedback: feedbackTotal,
};

export class History {
  constructor() {
    this.clear();
  }

  clear() {
    this.columns = { t: [] };
    for (const name of Object.keys(READ)) this.columns[name] = [];
    this.recent = [];
  }

  add(snapshot) {
    const { columns } = this;
    columns.t.push(snapshot.t_ms / 1000);
    for (const [name, read] of Object.entries(READ)) {
      const value = read(snapshot);
      columns[name].push(known(value) ? value : null);
    }
    this.recent.push(snapshot);
    while (this.recent.length > 2 && this.recent[1].t_ms <= snapshot.t_ms - RATE_WINDOW_MS) this.recent.shift();
    if (columns.t.length > LIMIT) this.thin();
  }

  // Keep the newest half as it is and every other point before it.
  thin() {
    const half = LIMIT / 2;
    for (const [name, column] of Object.entries(this.columns)) {
      this.columns[name] = column.filter((_, at) => at >= column.length - half || at % 2 === 0);
    }
  }

  // Change a second over the last few seconds; undefined until two snapshots know the total.
  rate(name) {
    const first = this.recent[0];
    const last = this.recent.at(-1);
    if (!first || first === last) return undefined;
    const [before, after] = [TOTALS[name](first), TOTALS[name](last)];
    if (!known(before) || !known(after)) return undefined;
    return Math.max(0, after - before) / ((last.t_ms - first.t_ms) / 1000);
  }
}
