#!lua flags=allow-oom
-- include keys.lua
-- include fence_trainer.lua
-- include fields.lua
-- ARGV: 3 id of the last group that this trainer has got, 4 count. Delivered-but-never-seen groups come first: those of the
-- trainer that died before this one, and those whose reply was lost; both are pending beyond ARGV[3]. XREADGROUP with an
-- id raises the delivery count as '>' does.
local function read(from)
  local reply = redis.call('XREADGROUP', 'GROUP', 'trainer', 'trainer', 'COUNT', ARGV[4], 'STREAMS', K.groups, from)
  return reply and reply[1][2] or {}
end
local entries = read(ARGV[3])
if #entries == 0 then entries = read('>') end
local delivered = {}
for _, entry in ipairs(entries) do
  local id, fields = entry[1], entry[2]
  if fields then
    local pending = redis.call('XPENDING', K.groups, 'trainer', id, id, 1)[1]
    delivered[#delivered + 1] = {id, pending[4], key_and_body(fields)}
  else
    -- Pending but deleted by hand: there is nothing left to deliver.
    redis.call('XACK', K.groups, 'trainer', id)
  end
end
local last = '0-0'
local info = redis.call('XINFO', 'GROUPS', K.groups)[1]
for i = 1, #info, 2 do
  if info[i] == 'last-delivered-id' then last = info[i + 1] end
end
return {'ok', delivered, last}
