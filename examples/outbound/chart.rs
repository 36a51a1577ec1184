//! What was measured, as an SVG: a column for each phase, a row for each measure, a bar for each contender.
//!
//! The panels of a row share their scale, so that phases can be compared; the value stands on its bar, so that small
//! ones can be read.

use std::path::Path;

use anyhow::Context as _;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::table::{Report, Row};

const COLOURS: [RGBColor; 5] = [
    RGBColor(160, 160, 160),
    RGBColor(214, 96, 77),
    RGBColor(67, 147, 195),
    RGBColor(27, 120, 55),
    RGBColor(127, 191, 123),
];
const TITLE: i32 = 74;
const LEFT: i32 = 150;
/// A panel, and from one to the next, in pixels.
const WIDTH: i32 = 205;
const HEIGHT: i32 = 112;
/// The room of one of five bars.
const BAR: i32 = WIDTH / 5;
const STEP_RIGHT: usize = WIDTH as usize + 8;
const STEP_DOWN: usize = HEIGHT as usize + 10;

/// A row of the chart.
struct Measure {
    name: &'static str,
    unit: &'static str,
    /// How to read it.
    better: &'static str,
    of: fn(&Row) -> Option<f64>,
}

const MEASURES: [Measure; 9] = [
    Measure {
        name: "in time",
        unit: "% of calls",
        better: "more is better",
        of: |row| Some(percent(row, row.tally.good)),
    },
    Measure { name: "p50", unit: "ms", better: "all calls", of: |row| Some(milliseconds(row, 0.5)) },
    Measure { name: "p99", unit: "ms", better: "all calls", of: |row| Some(milliseconds(row, 0.99)) },
    Measure { name: "p99.9", unit: "ms", better: "all calls", of: |row| Some(milliseconds(row, 0.999)) },
    Measure {
        name: "time lost",
        unit: "ms per failed call",
        better: "less is kinder",
        of: |row| Some(row.tally.lost_per_failure().as_secs_f64() * 1e3),
    },
    Measure { name: "tries", unit: "per call", better: "less is cheaper", of: |row| Some(row.attempts_per_call()) },
    Measure { name: "server load", unit: "requests/s", better: "less is kinder", of: Row::load },
    Measure {
        name: "refused early",
        unit: "% of calls",
        better: "by the client's rules",
        of: |row| Some(percent(row, row.tally.refused)),
    },
    Measure {
        name: "outlived",
        unit: "% of calls",
        better: "should be none",
        of: |row| Some(percent(row, row.tally.outlived)),
    },
];

fn percent(row: &Row, count: u64) -> f64 {
    100.0 * row.tally.share(count)
}

fn milliseconds(row: &Row, quantile: f64) -> f64 {
    row.tally.quantile(quantile).as_secs_f64() * 1e3
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws the report into a file, and makes the folder if there is none.
pub fn draw(report: &Report, path: &Path) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).context("cannot make the folder")?;
    }
    let lefts = || (LEFT..).step_by(STEP_RIGHT);
    let tops = || (TITLE..).step_by(STEP_DOWN);
    let columns = report.blocks.len();
    // One column alone must still hold the legend.
    let width = LEFT as u32 + (columns * STEP_RIGHT).max(600) as u32 + 10;
    let height = TITLE as u32 + (MEASURES.len() * STEP_DOWN) as u32 + 10;
    let root = SVGBackend::new(path, (width, height)).into_drawing_area();
    root.fill(&WHITE)?;
    legend(&root, report)?;
    for (left, block) in lefts().zip(&report.blocks) {
        root.draw(&text(block.name, (left + WIDTH / 2, TITLE - 8), 16, HPos::Center))?;
    }
    for (top, measure) in tops().zip(&MEASURES) {
        for (down, size, words) in [(44, 16, measure.name), (64, 13, measure.unit), (81, 12, measure.better)] {
            root.draw(&text(words, (12, top + down), size, HPos::Left))?;
        }
        let values = report.blocks.iter().flat_map(|block| &block.rows).filter_map(measure.of);
        let highest = values.fold(0.0, f64::max);
        for (left, block) in lefts().zip(&report.blocks) {
            let panel = root.clone().shrink((left, top), (WIDTH, HEIGHT));
            bars(&panel, &block.rows, measure.of, highest)?;
        }
    }
    root.present().context("cannot write the file")
}

/// The bars of one panel, on a scale that ends somewhat above `highest`.
fn bars(panel: &Area<'_>, rows: &[Row], of: fn(&Row) -> Option<f64>, highest: f64) -> anyhow::Result<()> {
    panel.draw(&Rectangle::new([(0, 0), (WIDTH, HEIGHT)], RGBColor(247, 247, 247).filled()))?;
    let floor = HEIGHT - 2;
    for ((middle, row), colour) in (BAR / 2..).step_by(BAR as usize).zip(rows).zip(COLOURS) {
        let Some(value) = of(row) else {
            panel.draw(&text("-", (middle, floor - 2), 12, HPos::Center))?;
            continue;
        };
        // Room above the highest for its number.
        let room = f64::from(HEIGHT - 20);
        let top = floor - if highest > 0.0 { (value / highest * room).round() as i32 } else { 0 };
        panel.draw(&Rectangle::new([(middle - BAR / 3, top), (middle + BAR / 3, floor)], colour.filled()))?;
        panel.draw(&text(&short(value), (middle, top - 2), 12, HPos::Center))?;
    }
    panel.draw(&PathElement::new([(0, floor), (WIDTH, floor)], BLACK))?;
    Ok(())
}

/// Who has which colour.
fn legend(root: &Area<'_>, report: &Report) -> anyhow::Result<()> {
    root.draw(&text("Outbound calls, measured", (12, 30), 20, HPos::Left))?;
    let rows = report.blocks.first().map_or(&[][..], |block| &block.rows);
    for ((left, row), colour) in (280..).step_by(90).zip(rows).zip(COLOURS) {
        root.draw(&Rectangle::new([(left, 16), (left + 14, 30)], colour.filled()))?;
        root.draw(&text(row.name, (left + 20, 29), 15, HPos::Left))?;
    }
    Ok(())
}

/// Black text whose bottom is at `at`.
fn text(words: &str, at: (i32, i32), size: u32, anchor: HPos) -> Text<'static, (i32, i32), String> {
    let style = ("sans-serif", size).into_font().color(&BLACK).pos(Pos::new(anchor, VPos::Bottom));
    Text::new(words.to_owned(), at, style)
}

/// As few digits as can be told apart.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        ..9.995 => format!("{value:.2}"),
        ..99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}
