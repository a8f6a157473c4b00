// One colour for each weight from 0 to 1. Lightness falls (on dark pages rises) in even steps, in Oklab, where equal
// steps look equal: so the scale reads in grey and with any kind of colour vision too.
// Oklab: https://bottosson.github.io/posts/oklab/

const STEPS = 256;
const dark = matchMedia("(prefers-color-scheme: dark)");

// Lightness, chroma and hue (degrees), at even distances.
const LIGHT = [[0.985, 0.008, 235], [0.82, 0.085, 225], [0.655, 0.135, 245], [0.49, 0.165, 262], [0.325, 0.14, 278]];
const DARK = [[0.225, 0.025, 270], [0.4, 0.13, 268], [0.575, 0.15, 250], [0.75, 0.12, 210], [0.925, 0.1, 160]];

export function oklchToRgb(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180), b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map(part => Math.round(255 * gamma(Math.min(1, Math.max(0, part)))));
}

const gamma = part => (part <= 0.0031308 ? 12.92 * part : 1.055 * part ** (1 / 2.4) - 0.055);

function scaleOf(stops) {
  return Array.from({length: STEPS}, (_, step) => {
    const at = (step / (STEPS - 1)) * (stops.length - 1), from = Math.min(Math.floor(at), stops.length - 2);
    return oklchToRgb(...stops[from].map((part, index) => part + (stops[from + 1][index] - part) * (at - from)));
  });
}

export const SCALES = {light: scaleOf(LIGHT), dark: scaleOf(DARK)};

const scale = () => (dark.matches ? SCALES.dark : SCALES.light);

export const onThemeChange = act => dark.addEventListener("change", act);

export function colorOf(weight) {
  return scale()[Math.round(Math.min(1, Math.max(0, weight)) * (STEPS - 1))];
}

export const cssOf = weight => `rgb(${colorOf(weight).join(" ")})`;

// What the colours mean, from 0 to `top`.
export function showLegend(host, top, about = "weight") {
  const bar = document.createElement("span");
  bar.className = "scale";
  bar.style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(cssOf).join(", ")})`;
  host.replaceChildren(about, " 0", bar, top);
}
