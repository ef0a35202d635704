// Numbers and times as people read them. A missing value is an en dash, everywhere.
export const NONE = "\u2013";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clockTime = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const known = (x) => typeof x === "number" && Number.isFinite(x);

export const count = (x) => (known(x) ? whole.format(x) : NONE);

// 3 significant digits: 1.23, 12.3, 123, 12.3k, 1.23M
export function short(x) {
  if (!known(x)) return NONE;
  const size = Math.abs(x);
  if (size >= 999500) return `${digits(x / 1e6)}M`;
  if (size >= 9995) return `${digits(x / 1e3)}k`;
  return size >= 999.5 ? whole.format(x) : digits(x);
}

function digits(x) {
  const size = Math.abs(x);
  if (size === 0) return "0";
  return x.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
}

// For tight places: 5.5, 16, 240
export const brief = (x) => (known(x) && Math.abs(x) < 9.95 ? x.toFixed(1) : short(known(x) ? Math.round(x) : x));

export const fixed = (places) => (x) => (known(x) ? x.toFixed(places) : NONE);

export const rate = (x) => (known(x) ? `${x < 9.95 && x > 0 ? x.toFixed(1) : count(x)} / s` : NONE);

export function share(x) {
  if (!known(x)) return NONE;
  const percent = x * 100;
  if (percent === 0) return "0%";
  return percent < 0.1 ? "<0.1%" : `${percent.toFixed(percent < 10 ? 1 : 0)}%`;
}

export function span(seconds) {
  if (!known(seconds)) return NONE;
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
}

export const clock = (ms) => (known(ms) ? clockTime.format(ms) : NONE);
