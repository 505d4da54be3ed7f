//! Line charts as SVG.

use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

use crate::error::Error;

/// Width and height in pixels.
const SIZE: (u32, u32) = (720, 440);

/// Colours that differ for most eyes, also in grey (Okabe and Ito, without the two lightest).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// How both axes grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// By adding, from 0.
    Linear,
    /// By multiplying: all numbers are to be greater than 0.
    Logarithmic,
    /// The horizontal axis by multiplying, the vertical one by adding from 0.
    Mixed,
}

/// One line.
#[derive(Debug, Clone)]
pub struct Series {
    /// What it is called.
    pub name: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// One chart.
#[derive(Debug, Clone)]
pub struct Plot {
    /// Part of the file's name.
    pub name: String,
    /// What it shows.
    pub title: String,
    /// What is on the horizontal axis.
    pub x: String,
    /// What is on the vertical axis.
    pub y: String,
    /// How the axes grow.
    pub scale: Scale,
    /// Lines.
    pub series: Vec<Series>,
}

impl Plot {
    /// The chart.
    ///
    /// # Errors
    /// If there is nothing to be drawn.
    pub fn svg(&self) -> Result<String, Error> {
        let mut text = String::new();
        {
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            self.draw(&area).map_err(|error| Error::Usage(format!("cannot draw {}: {error}", self.name)))?;
        }
        Ok(text)
    }

    fn draw(&self, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), Box<dyn std::error::Error>> {
        area.fill(&WHITE)?;
        let mut builder = ChartBuilder::on(area);
        builder.caption(&self.title, ("sans-serif", 18)).margin(12).x_label_area_size(40).y_label_area_size(80);
        let points = || self.series.iter().flat_map(|series| &series.points);
        let (left, right) = bounds(points().map(|point| point.0)).ok_or("no points")?;
        let (low, high) = bounds(points().map(|point| point.1)).ok_or("no points")?;
        match self.scale {
            Scale::Linear => self.fill(builder.build_cartesian_2d(0.0..right * 1.02, 0.0..high * 1.1)?)?,
            Scale::Logarithmic => self.fill(
                builder.build_cartesian_2d((left..right * 1.1).log_scale(), (low * 0.8..high * 1.5).log_scale())?,
            )?,
            Scale::Mixed => {
                self.fill(builder.build_cartesian_2d((left..right * 1.1).log_scale(), 0.0..high * 1.1)?)?;
            }
        }
        area.present()?;
        Ok(())
    }

    fn fill<'a, X, Y>(
        &self,
        mut chart: ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    ) -> Result<(), Box<dyn std::error::Error>>
    where
        X: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
        SVGBackend<'a>: DrawingBackend<ErrorType: 'static>,
    {
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|value| number(*value))
            .y_label_formatter(&|value| number(*value))
            .light_line_style(WHITE.mix(0.0))
            .draw()?;
        for (series, colour) in self.series.iter().zip(COLOURS.into_iter().cycle()) {
            let line = chart.draw_series(LineSeries::new(series.points.iter().copied(), colour.stroke_width(2)))?;
            line.label(&series.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        // Lines rise to the right, and histograms fall.
        let legend = match self.scale {
            Scale::Mixed => SeriesLabelPosition::UpperRight,
            Scale::Linear | Scale::Logarithmic => SeriesLabelPosition::UpperLeft,
        };
        chart
            .configure_series_labels()
            .position(legend)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        Ok(())
    }
}

/// Least and most of numbers that are greater than 0.
fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let values = values.filter(|value| value.is_finite() && *value > 0.0);
    values.fold(None, |bounds, value| {
        let (least, most) = bounds.unwrap_or((value, value));
        Some((least.min(value), most.max(value)))
    })
}

/// A number on an axis, short.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{}M", digits(value / 1e6)),
        size if size >= 1e4 => format!("{}k", digits(value / 1e3)),
        _ => digits(value),
    }
}

fn digits(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_axes_are_short() {
        let texts = [0.0, 0.25, 100.0, 9000.0, 20_000.0, 1_500_000.0].map(number);
        assert_eq!(texts, ["0", "0.25", "100", "9000", "20k", "1.5M"]);
    }

    #[test]
    fn a_plot_of_nothing_is_refused() {
        let plot = Plot {
            name: "nothing".to_owned(),
            title: String::new(),
            x: String::new(),
            y: String::new(),
            scale: Scale::Logarithmic,
            series: vec![Series { name: "empty".to_owned(), points: vec![(1.0, 0.0)] }],
        };
        assert!(plot.svg().unwrap_err().to_string().contains("cannot draw nothing"));
    }
}
