// The six charts: what each shows, in which unit and range.
import { Chart } from "./charts.js";
import { fixed, short } from "./format.js";

const fromZero = (_, __, max) => [0, max > 0 ? max * 1.12 : 1];
const around = (pad, floor, ceiling) => (_, min, max) => {
  if (min === null || max === null) return [floor, ceiling];
  const margin = Math.max((max - min) * 0.12, pad);
  return [Math.max(floor, min - margin), Math.min(ceiling, max + margin)];
};
// PCOC is a ratio: a log axis, from at most 0.6 to at least 1.67, wide enough for an untrained model's first values.
const PCOC_COARSE = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100];
const PCOC_FINE = [0.5, 0.7, 1, 1.4, 2, 3];
const pcocRange = (_, min, max) => [Math.max(0.01, Math.min(0.6, (min ?? 1) / 1.1)), Math.min(200, Math.max(1.67, (max ?? 1) * 1.1))];
const pcocTicks = (_, __, min, max) => (max / min < 8 ? PCOC_FINE : PCOC_COARSE).filter((x) => x >= min && x <= max);
const three = fixed(3);
const four = fixed(4);
const plain = (x) => (x >= 1000 ? `${x / 1000}k` : `${Number(x.toPrecision(6))}`);

const SPECS = {
  throughput: { title: "Throughput", unit: "candidates / s", range: fromZero, tick: plain, series: [{ name: "scored", column: "candidates", color: "blue", format: short }] },
  latency: {
    title: "Latency", term: "latency", unit: "ms", range: fromZero, tick: plain,
    series: [{ name: "p50", column: "p50", color: "blue", format: short }, { name: "p99", column: "p99", color: "orange", format: short }],
  },
  auc: {
    title: "AUC", term: "auc", unit: "AUC", range: around(0.01, 0, 1), tick: fixed(2), empty: "Comes with the first labels\u2026",
    series: [
      { name: "truth", column: "truthAuc", color: "green", format: three },
      { name: "CTR", column: "ctrAuc", color: "blue", format: three },
      { name: "CTCVR", column: "ctcvrAuc", color: "orange", format: three },
    ],
  },
  ctr: {
    title: "CTR log loss", term: "logloss", unit: "nats", range: around(0.002, 0, 20), tick: three, empty: "Comes with the first labels\u2026",
    series: [{ name: "progressive", column: "ctrLogloss", color: "blue", format: four }],
  },
  ctcvr: {
    title: "CTCVR log loss", term: "logloss", unit: "nats", range: around(0.002, 0, 20), tick: three, empty: "Comes with the first labels\u2026",
    series: [{ name: "progressive", column: "ctcvrLogloss", color: "orange", format: four }],
  },
  pcoc: {
    title: "Calibration (PCOC)", term: "pcoc", unit: "predicted / observed", range: pcocRange, reference: 1, log: true, tick: plain,
    splits: pcocTicks, empty: "Comes with the first labels\u2026",
    series: [{ name: "CTR", column: "ctrPcoc", color: "blue", format: fixed(2) }, { name: "CTCVR", column: "ctcvrPcoc", color: "orange", format: fixed(2) }],
  },
};

export const makeCharts = () => Object.entries(SPECS).map(([id, spec]) => new Chart(document.getElementById(`chart-${id}`), spec));
