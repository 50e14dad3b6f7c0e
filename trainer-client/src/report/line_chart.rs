//! Line charts as inline SVG, drawn here: axes with ticks and units, labels at the lines' ends.

use std::fmt::Write;

use super::html::{PALETTE, count, escape};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 168.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 46.0;
/// Half a marker, which may stand out of the frame to the left and right.
const MARKER: f64 = 4.0;
/// Least distance between two labels' base lines.
const LABEL_DISTANCE: f64 = 16.0;

/// One line of a chart.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it is called; stands beside its end.
    pub label: String,
    /// Index into the palette; also decides the dashes, so that colour is not alone in telling lines apart.
    pub style: usize,
    /// In ascending order of x.
    pub points: Vec<(f64, f64)>,
}

/// A chart of a few lines.
#[derive(Clone, Debug)]
pub struct LineChart<'a> {
    /// What the chart shows, for those who cannot see it.
    pub title: &'a str,
    /// What is counted to the right.
    pub x_label: &'a str,
    /// What is counted upwards.
    pub y_label: &'a str,
    /// Its lines.
    pub series: Vec<Series>,
    /// Marks each point, for curves of a few measurements.
    pub has_markers: bool,
    /// How much of the curves is shown.
    pub frame: Frame,
    /// Decimals of the last value, which stands beside its line's label; none without.
    pub label_decimals: Option<usize>,
    /// A height that lines are to be read against, with its name.
    pub level: Option<Level<'a>>,
}

/// A horizontal line across a chart.
#[derive(Clone, Copy, Debug)]
pub struct Level<'a> {
    /// Where.
    pub y: f64,
    /// What it is; stands above its beginning.
    pub name: &'a str,
}

/// How much of the curves a chart shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Every point.
    Whole,
    /// The height of the last three quarters of them: the first fall so steeply that they would flatten the rest.
    Settled,
}

/// Colours and lines of a chart that stands alone.
const STANDALONE_STYLE: &str = include_str!("standalone.css");

/// Maps values to places in the drawing.
struct Scale {
    x: (f64, f64),
    y: (f64, f64),
}

impl Scale {
    fn x(&self, value: f64) -> f64 {
        LEFT + (value - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - (value - self.y.0) / (self.y.1 - self.y.0) * (HEIGHT - TOP - BOTTOM)
    }
}

impl LineChart<'_> {
    /// The chart, and whether its frame leaves out the steep beginning of a curve; `None` without a point.
    pub fn svg(&self, id: &str) -> Option<(String, bool)> {
        let (scale, is_cut) = self.scale()?;
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n<defs><clipPath id=\"{id}\">\
             <rect x=\"{}\" y=\"{TOP}\" width=\"{}\" height=\"{}\"/></clipPath></defs>\n",
            escape(self.title),
            LEFT - MARKER,
            WIDTH - LEFT - RIGHT + 2.0 * MARKER,
            HEIGHT - TOP - BOTTOM,
        );
        // Writing to a string cannot fail, and what it returns holds nothing to act on.
        let _ = self.axes(&mut svg, &scale);
        let _ = self.lines(&mut svg, &scale, id);
        let _ = self.labels(&mut svg, &scale);
        svg.push_str("</svg>\n");
        Some((svg, is_cut))
    }

    /// The chart as a file of its own, on white; `None` without a point.
    pub fn standalone(&self) -> Option<String> {
        let (svg, _) = self.svg("frame")?;
        let open = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" ",
            2.0 * WIDTH,
            2.0 * HEIGHT
        );
        let (tag, rest) = svg.split_once('>')?;
        let tag = tag.replacen("<svg ", &open, 1);
        Some(format!(
            "{tag}>\n<style>\n{STANDALONE_STYLE}</style>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{rest}"
        ))
    }

    /// A frame around the points.
    fn scale(&self) -> Option<(Scale, bool)> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x_max = points().map(|point| point.0).max_by(f64::total_cmp)?;
        let x_min = points().map(|point| point.0).min_by(f64::total_cmp)?;
        let settled = match self.frame {
            Frame::Whole => x_min,
            Frame::Settled => x_min + (x_max - x_min) / 4.0,
        };
        let low = points().map(|point| point.1).min_by(f64::total_cmp)?;
        let high = points().filter(|point| point.0 >= settled).map(|point| point.1).max_by(f64::total_cmp)?;
        let highest = points().map(|point| point.1).max_by(f64::total_cmp)?;
        let margin = ((high - low) * 0.06).max(0.01);
        let y = (low - margin, high + margin);
        let x = if x_max > x_min { (x_min, x_max) } else { (x_min, x_min + 1.0) };
        Some((Scale { x, y }, highest > y.1))
    }

    fn axes(&self, svg: &mut String, scale: &Scale) -> std::fmt::Result {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let (marks, step) = ticks(scale.y, 6);
        let decimals = decimals(step);
        for tick in marks {
            let y = scale.y(tick);
            writeln!(svg, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>")?;
            let x = LEFT - 8.0;
            writeln!(
                svg,
                "<text class=\"tick\" text-anchor=\"end\" x=\"{x}\" y=\"{:.1}\">{tick:.decimals$}</text>",
                y + 4.0
            )?;
        }
        let (marks, step) = ticks(scale.x, 6);
        for tick in marks {
            let x = scale.x(tick);
            writeln!(
                svg,
                "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom}\" y2=\"{}\"/>",
                bottom + 4.0
            )?;
            writeln!(
                svg,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{}\">{}</text>",
                bottom + 18.0,
                short(tick, step)
            )?;
        }
        writeln!(svg, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>")?;
        let middle = f64::midpoint(LEFT, right);
        writeln!(
            svg,
            "<text class=\"name\" text-anchor=\"middle\" x=\"{middle}\" y=\"{}\">{}</text>",
            HEIGHT - 8.0,
            escape(self.x_label)
        )?;
        let middle = f64::midpoint(TOP, bottom);
        writeln!(
            svg,
            "<text class=\"name\" text-anchor=\"middle\" transform=\"translate(13 {middle}) rotate(-90)\">{}</text>",
            escape(self.y_label)
        )
    }

    fn lines(&self, svg: &mut String, scale: &Scale, id: &str) -> std::fmt::Result {
        writeln!(svg, "<g clip-path=\"url(#{id})\">")?;
        if let Some(Level { y, name }) = self.level {
            let (y, right) = (scale.y(y), WIDTH - RIGHT);
            writeln!(
                svg,
                "<line class=\"level\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"
            )?;
            writeln!(
                svg,
                "<text class=\"tick\" x=\"{}\" y=\"{:.1}\">{}</text>",
                LEFT + 6.0,
                y - 5.0,
                escape(name)
            )?;
        }
        for series in &self.series {
            let places: Vec<String> =
                series.points.iter().map(|&(x, y)| format!("{:.1},{:.1}", scale.x(x), scale.y(y))).collect();
            writeln!(
                svg,
                "<polyline class=\"line series-{}\" points=\"{}\"/>",
                series.style % PALETTE,
                places.join(" ")
            )?;
            for &(x, y) in series.points.iter().filter(|_| self.has_markers) {
                writeln!(
                    svg,
                    "<circle class=\"marker series-{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}: {y:.3} at {}</title></circle>",
                    series.style % PALETTE,
                    scale.x(x),
                    scale.y(y),
                    escape(&series.label),
                    count(x)
                )?;
            }
        }
        writeln!(svg, "</g>")
    }

    /// A label at the end of each line, moved down where two would overlap.
    fn labels(&self, svg: &mut String, scale: &Scale) -> std::fmt::Result {
        let mut labels: Vec<(f64, f64, &Series, f64)> = self
            .series
            .iter()
            .filter_map(|series| series.points.last().map(|&(x, y)| (scale.x(x), scale.y(y), series, y)))
            .collect();
        labels.sort_by(|left, right| left.1.total_cmp(&right.1));
        let mut lowest = f64::NEG_INFINITY;
        for label in &mut labels {
            label.1 = label.1.clamp(TOP + 6.0, HEIGHT).max(lowest + LABEL_DISTANCE);
            lowest = label.1;
        }
        // What ran over the bottom is pushed up again.
        let mut highest = HEIGHT - BOTTOM + LABEL_DISTANCE;
        for label in labels.iter_mut().rev() {
            label.1 = label.1.min(highest - LABEL_DISTANCE);
            highest = label.1;
        }
        for (x, y, series, value) in labels {
            let value = self.label_decimals.map_or(String::new(), |decimals| format!("{value:.decimals$}"));
            writeln!(
                svg,
                "<text class=\"label series-{}\" x=\"{:.1}\" y=\"{:.1}\">{} <tspan class=\"value\">{value}</tspan></text>",
                series.style % PALETTE,
                x + 8.0,
                y + 4.0,
                escape(&shortened(&series.label, self.label_decimals.is_some()))
            )?;
        }
        Ok(())
    }
}

/// As much of a label as the margin holds.
fn shortened(label: &str, has_value: bool) -> String {
    let characters_max = if has_value { 12 } else { 17 };
    if label.chars().count() <= characters_max {
        return label.to_owned();
    }
    label.chars().take(characters_max - 1).chain(['…']).collect()
}

/// Round numbers within a range, at most `most + 1`, and the distance between them: 1, 2 or 5 times a power of ten.
fn ticks(range: (f64, f64), most: u32) -> (Vec<f64>, f64) {
    let rough = (range.1 - range.0) / f64::from(most);
    let power = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|&step| step >= rough * 0.999);
    let step = step.unwrap_or(10.0 * power);
    let first = (range.0 / step - 1e-9).ceil();
    let ticks = (0..=most).map(|index| (first + f64::from(index)) * step);
    (ticks.take_while(|&tick| tick <= range.1 + step * 1e-9).collect(), step)
}

/// The number at a tick: with as many decimals as tell it from its neighbours, or shortened.
fn short(tick: f64, step: f64) -> String {
    if step >= 1.0 {
        return count(tick);
    }
    let decimals = decimals(step);
    // Rounding leaves minus signs before zeros.
    let tick = if tick.abs() < step / 2.0 { 0.0 } else { tick };
    format!("{tick:.decimals$}")
}

/// Decimals that tell ticks of this distance apart.
fn decimals(step: f64) -> usize {
    (-step.log10().floor()).max(0.0) as usize
}

#[cfg(test)]
mod tests {
    use super::{decimals, short, ticks};

    #[test]
    fn ticks_are_round_numbers_within_the_range() {
        assert_eq!(ticks((0.0, 100.0), 5).0, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        let (found, step) = ticks((2.93, 3.41), 6);
        let found: Vec<String> = found.iter().map(|tick| format!("{tick:.0$}", decimals(step))).collect();
        assert_eq!(found, ["3.0", "3.1", "3.2", "3.3", "3.4"]);
        assert_eq!(decimals(0.05), 2);
        assert_eq!(decimals(50.0), 0);
    }

    #[test]
    fn numbers_at_ticks_are_told_apart() {
        let shown: Vec<String> = [-0.5, -1e-17, 0.5].map(|tick| short(tick, 0.5)).into();
        assert_eq!(shown, ["-0.5", "0.0", "0.5"]);
        assert_eq!([short(20_000.0, 5000.0), short(-4.0, 2.0)], ["20k", "-4"]);
    }
}
