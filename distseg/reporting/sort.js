// Tables of class "sortable" sort by the columns whose heads say so; undefined values stay last.
for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.querySelectorAll("th[data-column]")];
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const column = Number(head.dataset.column);
      const rows = [...table.tBodies[0].rows].map(row => [row, valueOf(row, column)]);
      rows.sort(([, a], [, b]) => (a === null) - (b === null) || (a === null ? 0 : sign * compare(a, b)));
      table.tBodies[0].append(...rows.map(([row]) => row));
    });
  }
}
