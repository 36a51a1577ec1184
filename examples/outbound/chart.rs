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

const COLOURS: [RGBColor; 4] =
    [RGBColor(160, 160, 160), RGBColor(214, 96, 77), RGBColor(67, 147, 195), RGBColor(27, 120, 55)];
const TITLE: u32 = 74;
const LEFT: u32 = 150;
const PANEL: (u32, u32) = (172, 126);

/// A row of the chart.
struct Measure {
    name: &'static str,
    unit: &'static str,
    /// How to read it.
    better: &'static str,
    of: fn(&Row) -> Option<f64>,
}

const MEASURES: [Measure; 8] = [
    Measure { name: "in time", unit: "% of calls", better: "more is better", of: |row| percent(row, row.tally.good) },
    Measure { name: "p50", unit: "ms", better: "all calls", of: |row| Some(milliseconds(row, 0.5)) },
    Measure { name: "p99", unit: "ms", better: "all calls", of: |row| Some(milliseconds(row, 0.99)) },
    Measure { name: "p99.9", unit: "ms", better: "all calls", of: |row| Some(milliseconds(row, 0.999)) },
    Measure { name: "tries", unit: "per call", better: "less is cheaper", of: |row| Some(row.attempts_per_call()) },
    Measure { name: "server load", unit: "requests/s", better: "less is kinder", of: Row::load },
    Measure {
        name: "refused early",
        unit: "% of calls",
        better: "by the client's rules",
        of: |row| percent(row, row.tally.refused),
    },
    Measure {
        name: "outlived",
        unit: "% of calls",
        better: "should be none",
        of: |row| percent(row, row.tally.outlived),
    },
];

fn percent(row: &Row, count: u64) -> Option<f64> {
    Some(100.0 * row.tally.share(count))
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
    let (width, height) = PANEL;
    let columns = report.blocks.len() as u32;
    // One column alone must still hold the legend.
    let size = (LEFT + (width * columns).max(500) + 10, TITLE + height * MEASURES.len() as u32 + 10);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    legend(&root, report)?;
    for (column, block) in (0_u32..).zip(&report.blocks) {
        let middle = (LEFT + width * column + width / 2) as i32;
        root.draw(&text(block.name, (middle, TITLE as i32 - 8), 16, &BLACK, HPos::Center))?;
    }
    for (line, measure) in (0_u32..).zip(&MEASURES) {
        let top = TITLE + height * line;
        for (at, size, words) in [(48, 16, measure.name), (68, 13, measure.unit), (85, 12, measure.better)] {
            root.draw(&text(words, (12, top as i32 + at), size, &BLACK, HPos::Left))?;
        }
        let values = report.blocks.iter().flat_map(|block| &block.rows).filter_map(measure.of);
        let highest = values.fold(0.0, f64::max);
        for (column, block) in (0_u32..).zip(&report.blocks) {
            let (left, top) = (LEFT + width * column, top);
            let panel = root.clone().shrink((left, top), (width, height)).margin(4, 4, 4, 4);
            bars(&panel, &block.rows, measure.of, highest)?;
        }
    }
    root.present().context("cannot write the file")
}

/// The bars of one panel, on a scale that ends somewhat above `highest`.
fn bars(panel: &Area<'_>, rows: &[Row], of: fn(&Row) -> Option<f64>, highest: f64) -> anyhow::Result<()> {
    let (width, height) = panel.dim_in_pixel();
    panel.draw(&Rectangle::new([(0, 0), (width as i32, height as i32)], RGBColor(247, 247, 247).filled()))?;
    let floor = height as i32 - 2;
    let slot = width as i32 / rows.len().max(1) as i32;
    for (index, row) in (0_i32..).zip(rows) {
        let middle = slot * index + slot / 2;
        let Some(value) = of(row) else {
            panel.draw(&text("-", (middle, floor - 2), 12, &BLACK, HPos::Center))?;
            continue;
        };
        let room = f64::from(height) - 20.0;
        let top = floor - if highest > 0.0 { (value / highest * room).round() as i32 } else { 0 };
        let colour = COLOURS[index as usize % COLOURS.len()];
        panel.draw(&Rectangle::new([(middle - slot / 3, top), (middle + slot / 3, floor)], colour.filled()))?;
        panel.draw(&text(&short(value), (middle, top - 2), 12, &BLACK, HPos::Center))?;
    }
    panel.draw(&PathElement::new([(0, floor), (width as i32, floor)], BLACK))?;
    Ok(())
}

/// Who has which colour.
fn legend(root: &Area<'_>, report: &Report) -> anyhow::Result<()> {
    root.draw(&text("Outbound calls, measured", (12, 30), 20, &BLACK, HPos::Left))?;
    let rows = report.blocks.first().map_or(&[][..], |block| &block.rows);
    for (index, row) in (0_i32..).zip(rows) {
        let left = 280 + 90 * index;
        let colour = COLOURS[index as usize % COLOURS.len()];
        root.draw(&Rectangle::new([(left, 16), (left + 14, 30)], colour.filled()))?;
        root.draw(&text(row.name, (left + 20, 29), 15, &BLACK, HPos::Left))?;
    }
    Ok(())
}

/// Text whose bottom is at `at`.
fn text<'a>(words: &str, at: (i32, i32), size: u32, colour: &'a RGBColor, side: HPos) -> Text<'a, (i32, i32), String> {
    let style = ("sans-serif", size).into_font().color(colour).pos(Pos::new(side, VPos::Bottom));
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
