-- Key and body of an entry's fields; empty where there are none, as in what somebody else put into the stream.
local function key_and_body(fields)
  local found = {key = '', body = ''}
  for i = 1, #fields, 2 do found[fields[i]] = fields[i + 1] end
  return found.key, found.body
end
