//! What was let in over time, and what was refused, as an SVG of two panels with one axis of time.

use std::path::Path;

use anyhow::Context as _;
use plotters::prelude::*;

use crate::server::{SLICE, Slice};

const HONEST: RGBColor = RGBColor(27, 120, 55);
const FLOOD: RGBColor = RGBColor(214, 96, 77);
const REFUSED: RGBColor = RGBColor(120, 120, 120);

/// Draws the slices into a file, and makes the folder if there is none.
pub fn draw(slices: &[Slice], path: &Path) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).context("cannot make the folder")?;
    }
    let root = SVGBackend::new(path, (900, 620)).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(310);
    panel(
        &upper,
        slices,
        "let in, a second",
        &[("honest tenants", HONEST, |slice| slice.honest), ("made-up names", FLOOD, |slice| slice.flood)],
    )?;
    panel(&lower, slices, "refused, a second", &[("made-up names", REFUSED, |slice| slice.refused)])?;
    root.present().context("cannot write the file")
}

type Line = (&'static str, RGBColor, fn(&Slice) -> u64);

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    slices: &[Slice],
    title: &str,
    lines: &[Line],
) -> anyhow::Result<()> {
    let per_second = |count: u64| count as f64 / SLICE.as_secs_f64();
    let highest =
        slices.iter().flat_map(|slice| lines.iter().map(|(_, _, of)| per_second(of(slice)))).fold(1.0, f64::max);
    let lasts = slices.len() as f64 * SLICE.as_secs_f64();
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..lasts, 0.0..highest * 1.1)?;
    chart.configure_mesh().light_line_style(WHITE).x_desc("seconds").draw()?;
    for (name, colour, of) in lines {
        let points = slices
            .iter()
            .enumerate()
            .map(|(slice, counts)| ((slice as f64 + 0.5) * SLICE.as_secs_f64(), per_second(of(counts))));
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(*name)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.filled()).border_style(BLACK).draw()?;
    Ok(())
}
