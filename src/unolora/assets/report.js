"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const plots = [...document.querySelectorAll(".plot")].map((host) => ({
    host,
    spec: JSON.parse(host.nextElementSibling.textContent),
    hidden: new Set(),
  }));
  // A finger that scrolls the page must not zoom a figure.
  const zooms = matchMedia("(hover: hover) and (pointer: fine)").matches;
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;

  // The stylesheet owns the colours; an element must wear one for light-dark() to be resolved.
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };

  const faint = (paint) => paint.replace(/^rgb\((.*)\)$/, "rgba($1, 0.18)");

  // A trace's `meta` is the number of a series, or the name of a heat map's scale.
  const dress = (trace) => {
    if (trace.type === "heatmap") {
      const [low, middle, high] = [colour("low"), colour("panel"), colour("high")];
      trace.colorscale = trace.meta === "diverging" ? [[0, low], [0.5, middle], [1, high]] : [[0, middle], [1, high]];
      trace.colorbar = { ...trace.colorbar, tickcolor: colour("muted"), tickfont: { color: colour("ink") } };
      return;
    }
    const paint = colour(`series-${trace.meta % 8}`);
    if (trace.marker || trace.type === "bar") trace.marker = { ...trace.marker, color: paint };
    if (trace.line) trace.line.color = paint;
    if (trace.fill) trace.fillcolor = faint(paint);
    for (const bar of ["error_x", "error_y"]) {
      if (trace[bar]) trace[bar].color = trace.type === "bar" ? colour("ink") : paint;
    }
  };

  const axis = (given) => ({
    automargin: true,
    gridcolor: colour("rule"),
    linecolor: colour("muted"),
    zerolinecolor: colour("muted"),
    zerolinewidth: 1,
    fixedrange: !zooms,
    ...given,
  });

  const draw = ({ host, spec, hidden }) => {
    const { data, layout } = structuredClone(spec);
    for (const trace of data) {
      dress(trace);
      trace.visible = !hidden.has(trace.meta);
    }
    for (const shape of layout.shapes ?? []) shape.line = { color: colour("muted"), width: 1, dash: "dot" };
    return Plotly.react(host, data, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("ink") },
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("rule"), namelength: -1, font: { color: colour("ink") } },
      showlegend: false,
      dragmode: zooms && "zoom",
      bargroupgap: 0.08,
      ...layout,
      margin: { l: 8, r: 10, t: 18, b: 28, ...layout.margin },
      width: host.clientWidth,
      xaxis: axis(layout.xaxis),
      yaxis: axis(layout.yaxis),
    }, { displayModeBar: zooms ? "hover" : false, displaylogo: false, modeBarButtons: [["resetScale2d"]] });
  };
  const drawAll = () => {
    if (window.Plotly) plots.forEach(draw);
  };

  const dark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const themed = () => {
    button.textContent = dark() ? "Light theme" : "Dark theme";
    drawAll();
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    themed();
  });
  system.addEventListener("change", themed);

  for (const key of document.querySelectorAll(".key")) {
    key.addEventListener("click", () => {
      const shown = key.getAttribute("aria-pressed") === "false";
      key.setAttribute("aria-pressed", String(shown));
      for (const plot of plots.filter((p) => key.closest("figure").contains(p.host))) {
        plot.hidden[shown ? "delete" : "add"](Number(key.dataset.series));
        draw(plot);
      }
    });
  }

  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      drawAll();
    }
  });
  // Paper is white and narrow whatever the screen was.
  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    root.classList.add("printing");
    drawAll();
  });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    root.classList.remove("printing");
    themed();
  });

  // plotly.js travels as gzip in base64.
  const unpack = async (text) => {
    const packed = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
    const script = document.createElement("script");
    script.textContent = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(script);
    drawAll();
  };

  const asked = /theme=(light|dark)/.exec(location.search + location.hash);
  if (asked) root.dataset.theme = asked[1];
  themed();
  const plotly = document.getElementById("plotly");
  if (plotly) unpack(plotly.textContent);
})();
