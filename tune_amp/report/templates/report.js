// Draws the figures of a report in the colours of the reader's scheme, and again where that changes.
"use strict";

(async () => {
  const textOf = (id) => document.getElementById(id).textContent;
  const darkOf = JSON.parse(textOf("dark-colours")); // colour of the light scheme -> that of the dark one
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];

  // The inverse of pack in page.py: five characters are four bytes.
  const decode = (text) => {
    const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
    const valueOf = Object.fromEntries([...digits].map((digit, value) => [digit, value]));
    const bytes = new DataView(new ArrayBuffer(4 * Math.ceil(text.length / 5)));
    for (let start = 0; start < text.length; start += 5) {
      const group = [...text.slice(start, start + 5).padEnd(5, "~")];
      bytes.setUint32((4 * start) / 5, group.reduce((sum, digit) => 85 * sum + valueOf[digit], 0));
    }
    return bytes.buffer.slice(0, Math.floor((4 * text.length) / 5));
  };

  const unpack = (id) => {
    const packed = new Blob([decode(textOf(id))]);
    return new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  const recoloured = (value) => {
    if (typeof value === "string") return scheme.matches ? (darkOf[value] ?? value) : value;
    if (Array.isArray(value)) return value.map(recoloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, recoloured(item)]));
  };

  const draw = (plot) => {
    const { data, layout } = recoloured(figures[plot.id]);
    return Plotly.react(plot, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  };

  // Of many lines, the one under the pointer stands out, in every panel of its figure.
  const follow = (plot) => {
    const panels = [...plot.closest("figure").querySelectorAll(".plot")];
    const linesOf = (panel, trial) => panel.data.flatMap((trace, index) => (trace.meta?.[1] === trial ? [index] : []));
    const restyle = (trial, width) => {
      for (const panel of panels) {
        for (const index of linesOf(panel, trial)) {
          const own = panel.data[index];
          if (!own.mode.startsWith("lines")) continue;
          own.before ??= { width: own.line.width, opacity: own.opacity };
          const style = width ? { width, opacity: 1 } : own.before;
          Plotly.restyle(panel, { "line.width": style.width, opacity: style.opacity }, [index]);
        }
      }
    };
    const restyleAt = (width) => (event) => {
      const trial = event.points[0].data.meta?.[1];
      if (trial === undefined) return; // a bar or a mark, or a line that is no trial's
      restyle(trial, width);
    };
    plot.on("plotly_hover", restyleAt(4));
    plot.on("plotly_unhover", restyleAt(null));
  };

  // The boxes of a figure's key show and hide groups of lines, and the marks on them.
  const select = (figure) => {
    const hidden = new Set([...figure.querySelectorAll("input:not(:checked)")].map((box) => box.dataset.group));
    for (const panel of figure.querySelectorAll(".plot")) {
      const visible = panel.data.map((trace) => !hidden.has(trace.legendgroup) && !hidden.has(trace.meta?.[2]));
      Plotly.restyle(panel, { visible });
    }
  };

  if (!window.DecompressionStream) {
    for (const plot of plots) plot.textContent = "This browser is too old to draw the figures: it lacks DecompressionStream.";
    return;
  }
  const figures = JSON.parse(await unpack("plots"));
  const script = document.createElement("script"); // the page's policy names its hash
  script.textContent = await unpack("library");
  document.head.append(script);
  for (const plot of plots) draw(plot).then(() => follow(plot));
  for (const box of document.querySelectorAll(".key input")) {
    box.addEventListener("change", () => select(box.closest("figure")));
  }
  scheme.addEventListener("change", () => {
    Promise.all(plots.map(draw)).then(() => document.querySelectorAll("figure:has(.key)").forEach(select));
  });
})();
