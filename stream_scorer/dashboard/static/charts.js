// One card a chart: title, legend with live values, plot with swap markers. uPlot is the global of its own script.
import { NONE, clock, known } from "./format.js";
import { WORDS } from "./words.js";

const HEIGHT = 190;
const cursorGroup = "loop";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const element = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });

const dark = window.matchMedia("(prefers-color-scheme: dark)");

export class Chart {
  // spec: {title, term, unit, note, series: [{name, column, color, format}], range, reference, splits, log}
  constructor(root, spec) {
    this.root = root;
    this.spec = spec;
    this.markers = [];
    this.columns = null;
    this.buildCard();
    this.build();
    new ResizeObserver(() => this.resize()).observe(this.plotArea);
    dark.addEventListener("change", () => this.build());
  }

  buildCard() {
    const { spec } = this;
    const head = element("div", "head");
    const title = element("h3", "");
    if (spec.term) {
      const term = element("button", "term", spec.title);
      term.type = "button";
      term.dataset.term = spec.term;
      title.append(term);
    } else {
      title.textContent = spec.title;
    }
    this.legend = element("p", "legend");
    this.values = spec.series.map((series) => {
      const entry = element("span", "entry");
      const swatch = element("i", `swatch ${series.color}`);
      const value = element("b", "", NONE);
      entry.append(swatch, `${series.name} `, value);
      this.legend.append(entry);
      return value;
    });
    head.append(title, this.legend);
    this.plotArea = element("div", "plot");
    this.plotArea.setAttribute("role", "img");
    this.plotArea.setAttribute("aria-label", `Chart over time: ${spec.title}, ${spec.unit}. ${spec.term ? WORDS[spec.term][1] : ""}`);
    this.empty = element("p", "empty", spec.empty ?? "Collecting the first points\u2026");
    this.root.append(head, this.plotArea, this.empty);
  }

  build() {
    this.plot?.destroy();
    const { spec } = this;
    const axis = { stroke: css("--muted"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid"), width: 1, size: 4 } };
    const font = `11px ${css("--font")}`;
    const text = { font, labelFont: font, labelSize: 16, labelGap: 2 };
    this.plot = new window.uPlot(
      {
        width: Math.max(200, this.plotArea.clientWidth),
        height: HEIGHT,
        padding: [14, 10, 0, 0],
        legend: { show: false },
        cursor: { sync: { key: cursorGroup, setSeries: false }, drag: { x: false, y: false }, points: { size: 6 } },
        scales: { x: { time: true, range: (_, min, max) => (max - min < 30 ? [max - 30, max] : [min, max]) }, y: { range: spec.range, distr: spec.log ? 3 : 1 } },
        axes: [
          { ...axis, ...text, label: "local time", size: 26, space: 76, values: (_, splits) => splits.map((s) => clock(s * 1000)) },
          { ...axis, ...text, label: spec.unit, size: 46, space: 30, splits: spec.splits, filter: spec.log ? (_, splits) => splits : undefined, values: (_, splits) => splits.map(spec.tick ?? spec.series[0].format) },
        ],
        series: [{}, ...spec.series.map((s) => ({ stroke: css(`--${s.color}`), width: 1.75, spanGaps: true, points: { show: false } }))],
        hooks: { drawAxes: [(u) => this.drawUnder(u)], setCursor: [(u) => this.showValues(u.cursor.idx)] },
      },
      this.data(),
      this.plotArea,
    );
  }

  data() {
    const { columns, spec } = this;
    return columns ? [columns.t, ...spec.series.map((s) => columns[s.column])] : [[], ...spec.series.map(() => [])];
  }

  // Behind the lines: the reference value, and a dashed line where each version was swapped in.
  drawUnder(u) {
    const { ctx } = u;
    const { left, top, width, height } = u.bbox;
    const pixels = window.devicePixelRatio || 1;
    ctx.save();
    ctx.lineWidth = pixels;
    if (known(this.spec.reference)) {
      const y = u.valToPos(this.spec.reference, "y", true);
      ctx.strokeStyle = css("--good");
      line(ctx, left, y, left + width, y);
    }
    ctx.strokeStyle = css("--marker");
    ctx.fillStyle = css("--muted");
    ctx.font = `${10 * pixels}px ${css("--font")}`;
    ctx.textAlign = "center";
    ctx.setLineDash([3 * pixels, 3 * pixels]);
    let drawn = -Infinity;
    let labelled = -Infinity;
    for (const marker of this.markers) {
      const x = u.valToPos(marker.t, "x", true);
      if (x < left || x > left + width || x - drawn < 12 * pixels) continue;
      line(ctx, x, top, x, top + height);
      drawn = x;
      if (x - labelled < 26 * pixels) continue;
      ctx.fillText(`v${marker.version}`, x, top - 4 * pixels);
      labelled = x;
    }
    ctx.restore();
  }

  showValues(at) {
    const columns = this.data();
    this.values.forEach((node, index) => {
      const column = columns[index + 1];
      const value = known(at) ? column[at] : column.findLast((x) => x !== null);
      node.textContent = this.spec.series[index].format(value);
    });
  }

  update(columns, markers) {
    this.columns = columns;
    this.markers = markers;
    const data = this.data();
    const blank = !data.slice(1).some((column) => column.some((x) => x !== null));
    this.root.classList.toggle("blank", blank);
    this.plot.setData(data);
    this.showValues(this.plot.cursor.idx);
  }

  resize() {
    const width = this.plotArea.clientWidth;
    if (width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }
}

function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}
