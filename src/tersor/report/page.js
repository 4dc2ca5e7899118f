"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  const report = JSON.parse(document.getElementById("tersor-report").textContent);
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const PRINTED = { width: 345, height: 125 }; // pixels of half a page

  // ---- plots: the figures with the colours of the present theme
  const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const coloured = (value) => {
    if (typeof value === "string") return value.startsWith("--") ? style(value) : value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v)]));
    return value;
  };
  function layoutOf(layout, plot, printing) {
    const axis = { gridcolor: style("--grid"), zerolinecolor: style("--line"), linecolor: style("--line"), fixedrange: true };
    const made = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, dragmode: false, bargap: 0.15,
      font: { color: style("--ink"), size: printing ? 8 : 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: style("--panel"), bordercolor: style("--line"), font: { color: style("--ink") } },
      ...coloured(layout),
    };
    made.xaxis = { ...axis, ...made.xaxis };
    made.yaxis = { ...axis, ...made.yaxis };
    if (printing) {
      made.autosize = false;
      made.width = plot.closest(".pair") ? PRINTED.width : 2 * PRINTED.width + 10;
      made.height = Math.min(made.height, PRINTED.height);
      made.margin = { l: 45, r: 8, t: 6, b: 28 };
      if (made.legend) made.legend = { ...made.legend, font: { size: 7 } };
    }
    return made;
  }
  function draw(plot, printing = false) {
    const figure = figures[plot.dataset.figure];
    if (!figure) return;
    const traces = coloured(figure.data);
    for (const trace of traces) {
      if (trace.colorbar) trace.colorbar = { ...trace.colorbar, tickfont: { color: style("--ink") } };
    }
    Plotly.react(plot, traces, layoutOf(figure.layout, plot, printing),
      { responsive: !printing, displayModeBar: false, showTips: false });
    plot.dataset.drawn = "yes";
    const points = plot.dataset.links && !plot.dataset.listening;
    if (points) {
      plot.dataset.listening = "yes";
      plot.on("plotly_click", (event) => {
        const link = event.points[0].customdata && event.points[0].customdata[0];
        if (link) { location.hash = link; document.getElementById(link).focus(); }
      });
    }
  }
  const plots = () => [...document.querySelectorAll(".plot")];
  const isShown = (plot) => plot.offsetParent !== null;
  function drawShown() {
    for (const plot of plots()) if (isShown(plot) && plot.dataset.drawn !== "yes") draw(plot);
  }
  function drawAnew() {
    for (const plot of plots()) plot.dataset.drawn = "no";
    drawShown();
  }

  // ---- histograms and heat maps that a select box chooses
  function histogramFigure(view, which) {
    const trace = (histogram, name, colour, opacity) => {
      const width = (2 * histogram.limit) / histogram.counts.length;
      return {
        type: "bar", name, opacity, width, marker: { color: colour },
        x: histogram.counts.map((_, n) => -histogram.limit + (n + 0.5) * width),
        y: histogram.counts.map((count) => count || null),
        hovertemplate: "about %{x:.4g}: %{y:,} weights<extra>" + name + "</extra>",
      };
    };
    const data = [];
    if (which === "weights") {
      if (view.original) data.push(trace(view.original, "original", "--series-8", 0.6));
      if (view.weights) data.push(trace(view.weights, "compressed", "--series-1", view.original ? 0.7 : 1));
    } else if (view.error) data.push(trace(view.error, "compressed - original", "--series-2", 1));
    return { data, layout: {
      height: 260, barmode: "overlay", bargap: 0, margin: { l: 60, r: 10, t: 10, b: 45 }, showlegend: data.length > 1,
      legend: { orientation: "h", y: 1.15, x: 0 },
      xaxis: { title: { text: which === "weights" ? "weight" : "compressed - original" } },
      yaxis: { type: "log", title: { text: "weights" }, dtick: 1 },
    } };
  }
  function name(plot, label) {
    plot.parentElement.setAttribute("aria-label", label);
    plot.closest("figure").querySelector("figcaption").textContent = label;
  }
  function chooseLayer(select) {
    const result = report.results[Number(select.dataset.result)];
    const view = result.views.find((each) => each.name === select.value);
    for (const which of ["weights", "error"]) {
      const plot = document.getElementById(`${select.dataset.prefix}-${which}`);
      if (!plot) continue;
      figures[plot.dataset.figure] = histogramFigure(view, which);
      name(plot, `Histogram of the ${which} of ${view.name}`);
      plot.dataset.drawn = "no";
    }
    drawShown();
  }
  function chooseMeasure(select) {
    const plot = document.getElementById(select.dataset.plot);
    plot.dataset.figure = select.value;
    name(plot, `Heat map: ${select.selectedOptions[0].textContent}, by block and projection`);
    plot.dataset.drawn = "no";
    drawShown();
  }
  for (const select of document.querySelectorAll("select[data-result]")) {
    select.addEventListener("change", () => chooseLayer(select));
    chooseLayer(select);
  }
  for (const select of document.querySelectorAll("select[data-plot]")) {
    select.addEventListener("change", () => chooseMeasure(select));
  }

  // ---- tabs: arrows, Home and End move; the shown panel's plots are drawn when it is first shown
  for (const list of document.querySelectorAll('[role="tablist"]')) {
    const tabs = [...list.querySelectorAll('[role="tab"]')];
    const show = (tab, focus) => {
      for (const each of tabs) {
        const chosen = each === tab;
        each.setAttribute("aria-selected", String(chosen));
        each.tabIndex = chosen ? 0 : -1;
        document.getElementById(each.getAttribute("aria-controls")).hidden = !chosen;
      }
      if (focus) tab.focus();
      drawShown();
    };
    tabs.forEach((tab, n) => {
      tab.addEventListener("click", () => show(tab, false));
      tab.addEventListener("keydown", (event) => {
        const to = { ArrowRight: n + 1, ArrowLeft: n - 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        show(tabs[(to + tabs.length) % tabs.length], true);
      });
    });
    show(tabs[0], false);
  }

  // ---- the theme
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const theme = document.getElementById("theme");
  const tell = () => { theme.setAttribute("aria-pressed", String(isDark())); };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; tell(); drawAnew(); });
  dark.addEventListener("change", () => { tell(); drawAnew(); });
  tell();

  // ---- copy the command
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy).textContent;
      try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(document.getElementById(button.dataset.copy)); button.textContent = "Selected"; }
    });
  }

  // ---- paper: all panels, in the size of a page
  addEventListener("beforeprint", () => {
    const theme = root.dataset.theme;
    root.dataset.theme = "light";
    const hidden = [...document.querySelectorAll('[role="tabpanel"][hidden]')];
    for (const each of hidden) each.hidden = false;
    for (const plot of plots()) draw(plot, true);
    addEventListener("afterprint", () => {
      for (const each of hidden) each.hidden = true;
      if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
      drawAnew();
    }, { once: true });
  });
})();
