// Draws every figure into the element of its name, in the colours of the page, and again when those change.
"use strict";

// plotly is packed into the page, which would be three times as large without.
async function unpack(name) {
  const packed = Uint8Array.from(atob(document.getElementById(name).textContent), (char) => char.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}

const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

const themes = {
  light: {
    ink: "#1c1d21", faint: "#62656e", line: "#e3e3df", card: "#ffffff", hover: "#1c1d21", hoverInk: "#ffffff",
    accent: "#3454d1", areas: ["rgba(52,84,209,.16)", "rgba(52,84,209,.30)"],
    series: ["#3454d1", "#c2410c", "#24784a", "#8b5cf6", "#0e7490", "#be185d", "#6b7280", "#a16207"],
    sequential: [[0, "#f1f4fb"], [.25, "#b7c9ee"], [.5, "#6f8fdd"], [.75, "#3652b5"], [1, "#14205c"]],
    diverging: [[0, "#b2470d"], [.25, "#eaa47c"], [.5, "#f6f6f4"], [.75, "#8ba6ea"], [1, "#2440a8"]],
  },
  dark: {
    ink: "#e7e8ea", faint: "#9a9ea8", line: "#2d3037", card: "#1b1d22", hover: "#e7e8ea", hoverInk: "#131418",
    accent: "#8ea6ff", areas: ["rgba(142,166,255,.16)", "rgba(142,166,255,.30)"],
    series: ["#8ea6ff", "#ff9d66", "#6fce97", "#c4a5ff", "#5fd0e6", "#ff8fb8", "#b0b4bd", "#e3c15f"],
    sequential: [[0, "#20232c"], [.25, "#2b3f86"], [.5, "#5573d6"], [.75, "#9bb2f5"], [1, "#f3f6ff"]],
    diverging: [[0, "#ffab7a"], [.25, "#a3532a"], [.5, "#24262c"], [.75, "#4059b5"], [1, "#a9bcff"]],
  },
};

function painted(trace, theme, counts) {
  const kind = trace.meta;
  if (kind === "sequential" || kind === "diverging") {
    const bar = { ...trace.colorbar, tickfont: { color: theme.faint, size: 11 } };
    return { ...trace, colorscale: theme[kind], colorbar: bar };
  }
  if (kind === "area") return { ...trace, fillcolor: theme.areas[counts.area++ % theme.areas.length] };
  if (kind === "series" || kind === "accent") {
    const color = kind === "accent" ? theme.accent : theme.series[counts.series++ % theme.series.length];
    const line = trace.type === "scatter" ? { line: { ...trace.line, color } } : {};
    return { ...trace, ...line, marker: { ...trace.marker, color } };
  }
  return trace;
}

function laidOut(layout, theme) {
  const narrow = window.matchMedia("(max-width: 40rem)").matches;
  const axis = { color: theme.faint, gridcolor: theme.line, zerolinecolor: theme.line, linecolor: theme.line };
  const margin = narrow ? { ...layout.margin, l: Math.min(layout.margin.l, 42), r: layout.margin.r - 8 } : layout.margin;
  return {
    ...layout,
    margin,
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
    font: { color: theme.ink, size: narrow ? 11 : 12, family: getComputedStyle(document.body).fontFamily },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { ...layout.hoverlabel, bgcolor: theme.hover, bordercolor: theme.hover, font: { color: theme.hoverInk, size: 12 } },
  };
}

function draw(name, theme) {
  const counts = { area: 0, series: 0 };
  const { data, layout } = figures[name];
  const traces = data.map((trace) => painted(trace, theme, counts));
  return Plotly.react(name, traces, laidOut(layout, theme), { responsive: true, displayModeBar: false, showTips: false });
}

// One after the other, so that the page answers in between; a later call takes over from an earlier one.
let latest = 0;
async function drawAll(theme) {
  const own = ++latest;
  delete document.body.dataset.drawn;
  for (const name of Object.keys(figures)) {
    await draw(name, theme);
    await new Promise((next) => setTimeout(next));
    if (own !== latest) return;
  }
  document.body.dataset.drawn = theme === themes.dark ? "dark" : "light";
}

const current = () => (dark.matches ? themes.dark : themes.light);

function start() {
  drawAll(current());
  dark.addEventListener("change", () => drawAll(current()));
  // Paper is light, and what is folded cannot be opened there.
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((each) => { each.open = true; });
    Object.keys(figures).forEach((name) => draw(name, themes.light));
  });
  window.addEventListener("afterprint", () => drawAll(current()));
}

unpack("plotly").then(start, (error) => {
  document.getElementById("failed").hidden = false;
  throw error;
});
