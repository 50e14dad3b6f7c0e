//! Columns for a terminal.

/// Rows of cells as lines whose columns stand below one another: the first `names` columns to the left, numbers to the right.
/// A row may have fewer cells than another.
pub fn columns(rows: &[Vec<String>], names: usize) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column < names { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::columns;

    #[test]
    fn names_stand_to_the_left_and_numbers_to_the_right() {
        let rows = [vec!["source", "tokens"], vec!["a", "1"], vec!["größer als", "22"], vec!["alone"]];
        let rows = rows.map(|row| row.into_iter().map(str::to_owned).collect());
        let lines = ["source      tokens", "a                1", "größer als      22", "alone", ""];
        assert_eq!(columns(&rows, 1), lines.join("\n"));
        assert_eq!(columns(&[], 1), "");
    }
}
