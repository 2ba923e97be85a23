//! The report.
use anyhow::Result;
pub fn render(record: &demur_eval::record::Record) -> Result<String> {
    Ok(record.study.clone())
}
