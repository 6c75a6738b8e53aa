// Draws the API's reference from its OpenAPI schema: every route with its keys, an example, and its answers.
import { getKey } from "./api.js";
import { $, h } from "./dom.js";

const key = getKey();
const answer = await fetch("openapi.json", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
if (answer.ok) draw(await answer.json());
else
  $("#reference").replaceChildren(
    h(
      "p",
      { class: "error", role: "alert" },
      answer.status === 401
        ? "This API needs a key: type it into the viewer's form first, then come back."
        : `The schema can't be read (${answer.status}).`,
    ),
  );

function draw(schema) {
  const resolve = (part) =>
    part?.$ref
      ? { name: part.$ref.split("/").at(-1), ...schema.components.schemas[part.$ref.split("/").at(-1)] }
      : part;
  const named = (part) => {
    if (!part) return "";
    if (part.$ref) return part.$ref.split("/").at(-1);
    if (part.anyOf) return part.anyOf.map(named).join(" or ");
    if (part.type === "array") return `list of ${named(part.items)}`;
    if (part.enum) return part.enum.map((value) => JSON.stringify(value)).join(", ");
    return part.format === "binary" ? "file" : (part.type ?? "any");
  };
  const prose = (text) => text.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));
  const keys = (part) => {
    const rows = Object.entries(part.properties ?? {}).map(([name, value]) =>
      h(
        "tr",
        {},
        h("td", {}, name),
        h("td", {}, named(value)),
        h(
          "td",
          {},
          ...prose(
            [
              value.description?.replace(/\.$/, ""),
              value.default !== undefined && value.default !== null && `default \`${JSON.stringify(value.default)}\``,
              part.required?.includes(name) && "required",
            ]
              .filter(Boolean)
              .join("; "),
          ),
        ),
      ),
    );
    return rows.length
      ? h(
          "div",
          { class: "scroll", role: "region", tabindex: "0", "aria-label": `Keys of ${part.name ?? "the form"}` },
          h(
            "table",
            {},
            h("thead", {}, h("tr", {}, ...["key", "type", "meaning"].map((name) => h("th", { scope: "col" }, name)))),
            h("tbody", {}, ...rows),
          ),
        )
      : h("p", {});
  };
  const route = (path, method, about) => {
    const parts = [
      h("h2", {}, h("code", {}, h("span", { class: "method" }, method.toUpperCase()), path)),
      ...(about.description ?? "").split("\n\n").map((text) => h("p", {}, ...prose(text))),
    ];
    for (const [type, content] of Object.entries(about.requestBody?.content ?? {})) {
      const body = resolve(content.schema);
      const example = content.example ?? body.examples?.[0];
      parts.push(h("h3", {}, `${type}${body.name ? `: ${body.name}` : ""}`), keys(body));
      if (example)
        parts.push(
          h(
            "pre",
            { tabindex: "0" },
            `curl -s ${location.origin}${path} -H 'Content-Type: application/json' -d @- <<'JSON'\n` +
              `${JSON.stringify(example, null, 1)}\nJSON`,
          ),
        );
    }
    const answers = Object.entries(about.responses ?? {}).map(([status, response]) =>
      h(
        "tr",
        {},
        h("td", {}, status),
        h(
          "td",
          {},
          [
            response.description,
            ...Object.entries(response.content ?? {}).map(([type, content]) =>
              status === "200" ? `${type} ${named(content.schema)}` : "",
            ),
          ]
            .filter(Boolean)
            .join(" · "),
        ),
      ),
    );
    parts.push(h("details", {}, h("summary", {}, "Answers"), h("table", {}, h("tbody", {}, ...answers))));
    return h("section", { class: "card" }, ...parts);
  };
  $("#reference").replaceChildren(
    ...schema.info.description.split("\n\n").map((text) => h("p", {}, ...prose(text))),
    ...Object.entries(schema.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, about]) => route(path, method, about)),
    ),
    h("h2", {}, "Data types"),
    ...Object.entries(schema.components.schemas).map(([name, part]) =>
      h(
        "section",
        { class: "card" },
        h("h3", {}, name),
        h("p", { class: "hint" }, ...prose(part.description ?? "")),
        keys({ name, ...part }),
      ),
    ),
  );
}
